"""Text in, Report out."""
