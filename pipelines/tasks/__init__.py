"""What is asked of each row: tasks, their answer types and the columns of their answers."""
