"""What decides whether a row stays: rules, duplicates, contradictions, quality; and what is masked in it."""
