"""Entry points `python -m jobs.<name>`, and what they share: `options` parses, `cli` runs and reports."""
