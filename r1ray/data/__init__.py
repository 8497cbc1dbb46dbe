"""Rows in, rows out: reading, validating and writing conversations, and the demo set."""
