"""lm-evaluation-harness on run directories: `inl evaluate --tasks`, and tasks without a network."""
