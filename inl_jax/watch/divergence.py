"""Which checkpoints are good, by the losses of the updates after them."""

import collections
import math
import shlex
import statistics
from collections.abc import Collection

from inl_jax.config import TrainConfig
from inl_jax.console import say

WINDOW = 128  # losses that count
LEAST = 8  # losses before one can be far above them
FAR = 1.0  # nats
SPREADS = 8  # median deviations


class Losses:
    """The training losses of a run, one for each update, and which of its states are good.

    Finite weights may be ruined. A loss is far above the others if it exceeds their median by more
    than `FAR`, and by more than `SPREADS` times their median deviation. A state is good if its loss
    is finite, not far above, and not by more than `FAR` worse than a guess. The loss of update n is
    that of the state after update n - 1.
    """

    def __init__(self, vocab_size: int):
        self._guess = math.log(vocab_size)
        self._losses = collections.deque(maxlen=WINDOW)
        self._good: set[int] = set()
        self.far = False  # whether the last loss is far above the others

    def add(self, step: int, loss: float) -> None:
        """Notes the loss of update `step`, in nats per token."""
        most = self._guess + FAR
        if len(self._losses) >= LEAST:
            deviation = statistics.median(abs(other - self.median) for other in self._losses)
            most = self.median + max(FAR, SPREADS * deviation)
        self.far = not loss <= most
        if not self.far and loss <= self._guess + FAR:
            self._good.add(step - 1)
        if math.isfinite(loss):
            self._losses.append(loss)

    def allow_saving(self, step: int) -> bool:
        """Whether the state after update `step` may push out older ones; says if it may not."""
        if self.far:
            say(
                f"WARNING: update {step} is not saved: its loss is far above the median "
                f"{self.median:.4f} of the updates before, and the state may be ruined"
            )
        return not self.far

    @property
    def median(self) -> float:
        """The median of the last losses."""
        return statistics.median(self._losses)

    def describe_divergence(
        self,
        in_a_row: int,
        step: int,
        config: TrainConfig,
        saved: Collection[int],
        best: int | None,
    ) -> str:
        """What happened to a run that diverged, and how to resume it.

        Args:
          in_a_row: updates that were not finite.
          step: the last of them.
          config: the run.
          saved: its checkpoints.
          best: the one with the lowest validation loss, which is good too.
        """
        good = max((s for s in saved if s in self._good or s == best), default=None)
        return (
            f"{in_a_row} updates in a row, up to update {step}, had a non-finite loss or gradient "
            f"(max_nonfinite_steps={config.max_nonfinite_steps}) and changed nothing; "
            f"{_advice(config, good, saved)}, or look at the data"
        )


def _advice(config: TrainConfig, good: int | None, saved: Collection[int]) -> str:
    lower, run_dir = f"--optim.learning_rate {config.optim.learning_rate / 2:g}", config.run_dir
    if good is None:
        return (
            f"none of the checkpoints in {run_dir} is known to be good ({sorted(saved)}): start "
            f"anew with {lower} and another run_dir"
        )
    later = [f"{run_dir}/checkpoints/{step}" for step in sorted(saved) if step > good]
    remove = f"run `rm -r {shlex.join(later)}`, then " if later else ""
    return (
        f"the last good checkpoint in {run_dir} is update {good}: {remove}add {lower} to the same "
        "command, which resumes from there"
    )
