"""A version is promoted only if its evaluation says so: thresholds, no regression, nothing forgotten, safe answers, a true merge."""
