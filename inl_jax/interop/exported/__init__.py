"""The PyTorch code that travels with an exported model."""
