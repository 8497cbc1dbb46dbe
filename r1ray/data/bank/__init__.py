"""The demo's wording: customers' phrases, replies and value pools per language, as YAML."""
