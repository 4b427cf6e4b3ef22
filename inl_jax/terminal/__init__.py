"""What the verbs share at a terminal: flags and signals."""
