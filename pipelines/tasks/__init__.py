"""Tasks: questions about rows, answer types and the columns of answers."""
