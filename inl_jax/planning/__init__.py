"""What can be known before there is a device: memory, cost, collectives and checks."""
