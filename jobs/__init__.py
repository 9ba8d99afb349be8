"""Entry points, run as `python -m jobs.<name>`: parse, run the pipeline, report the counts. No logic."""
