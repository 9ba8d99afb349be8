"""Entry points `python -m jobs.<name>`, and the command line that they share."""
