"""PDF, Word, HTML and Markdown to Markdown."""
