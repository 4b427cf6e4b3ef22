"""What an update changes, and what a run leaves behind."""
