"""Processes that carry the records of a run to TensorBoard, W&B and trackio."""
