"""The mixers that tests go through: each in all layers, and two that alternate."""

PATTERN = "gated+attention"
FIELDS = {name: {"context": name} for name in ("mean", "decay", "gated", "attention")}
FIELDS[PATTERN] = {"context": "gated", "attention_every": 2}
"""Fields of `ModelConfig`."""
