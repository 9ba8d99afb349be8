"""A run's results as one HTML page: statistics from one pass over all rows, and a sample of rows with their media."""
