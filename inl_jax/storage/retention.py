"""Which checkpoints stay: the newest, the best, and the newest that is known to be good."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inl_jax.files import read_json


class Retention:
    """Orbax's preservation policy for a run.

    Attributes:
      good: the newest step that was verified or given its manifest; None if there is none.
    """

    def __init__(self, keep_last: int, best: Path):
        self._keep_last, self._best = keep_last, best
        self.good: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any = None) -> list[bool]:
        """Whether to keep each checkpoint, given in order of their steps."""
        del context
        kept = {c.step for c in checkpoints[-self._keep_last :]}
        kept |= {read_best(self._best).get("step"), self.good}
        return [c.step in kept for c in checkpoints]


def read_best(path: Path) -> dict[str, Any]:
    """What `Checkpoints.note_best` wrote; empty if there is none or it is damaged."""
    best = read_json(path)
    sound = isinstance(best.get("step"), int) and isinstance(best.get("validation_loss"), float)
    return best if sound else {}
