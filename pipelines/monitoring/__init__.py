"""What a run reports while it works: progress and the reasons of failed rows."""
