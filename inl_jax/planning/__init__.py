"""What is known before there is a device: memory, cost, exchanges, checks."""
