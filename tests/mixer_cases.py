"""The mixers of the tests: each alone, and a pattern of two."""

PATTERN = "gated+attention"
FIELDS = {name: {"context": name} for name in ("mean", "decay", "gated", "attention")}
FIELDS |= {PATTERN: {"context": "gated", "attention_every": 2}}
