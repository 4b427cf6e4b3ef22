"""What a path means, and files of any kind to documents."""
