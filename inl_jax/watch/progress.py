"""What the evaluations of a run say: when to stop early, and whether it over-fits."""

import math
from collections.abc import Collection, Iterable
from typing import NamedTuple

from inl_jax.training.metrics import Record


class Standing(NamedTuple):
    """How the last evaluation compares with the ones before."""

    best_step: int
    """Update of the evaluation that improved last; 0 if there is none."""
    best_loss: float
    """Its loss, in nats per token."""
    waited: int
    """Evaluations since then."""


def standing(records: Iterable[Record], *, basis: str, min_delta: float = 0.0) -> Standing:
    """The standing of a run, from its records alone: nothing else has to survive a kill.

    An evaluation improves if its loss is lower than that of the last one that improved by more than
    `min_delta` nats. NaN does not improve.

    Args:
      records: those of one branch, in order of updates.
      basis: evaluations of another validation text are left out.
      min_delta: the least improvement.
    """
    best_step, best_loss, waited = 0, math.inf, 0
    for record in records:
        if "validation_loss" in record and record.get("basis") == basis:
            if record["validation_loss"] < best_loss - min_delta:
                best_step, best_loss, waited = record["step"], record["validation_loss"], 0
            else:
                waited += 1
    return Standing(best_step, best_loss, waited)


def lowest(records: Iterable[Record], *, basis: str, among: Collection[int]) -> Record | None:
    """The evaluation of the lowest finite loss; None if there is none.

    Args:
      records: those of one branch.
      basis: evaluations of another validation text are left out.
      among: updates that count.
    """
    found = [
        record
        for record in records
        if record.get("basis") == basis
        and record["step"] in among
        and math.isfinite(record.get("validation_loss", math.nan))
    ]
    return min(found, key=lambda record: record["validation_loss"], default=None)


class Stretch(NamedTuple):
    """The updates since the last evaluation, for the mean of their training losses."""

    total: float = 0.0
    count: int = 0

    def add(self, loss: float) -> "Stretch":
        """With one more update; one whose loss is not finite was skipped and does not count."""
        return Stretch(self.total + loss, self.count + 1) if math.isfinite(loss) else self


def over_fitting(validation_loss: float, stretch: Stretch) -> Record:
    """The fields of an evaluation's record that compare it with training.

    `gap` is the validation loss less the mean training loss over the same stretch. The limits of
    the verdict are the published guide's: below 0.5 nats good, above 1.0 over-fitting.
    """
    if stretch.count == 0:
        return {}
    train_loss = stretch.total / stretch.count
    gap = validation_loss - train_loss
    if not math.isfinite(gap):
        return {"train_loss": train_loss}
    verdict = "good" if gap < 0.5 else "over-fitting" if gap > 1.0 else "watch it"
    return {"train_loss": train_loss, "gap": gap, "verdict": verdict}
