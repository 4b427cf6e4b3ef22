"""A phase of a curriculum: for how long, from which sources, and in sequences of what length."""

import dataclasses
import math
import re

from inl_jax.checks import InputError, check_types, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of `data.phases`, on a command line `SHARE[@SEQ_LEN]:WEIGHT,WEIGHT,...`."""

    share: float
    """Up to 1: the share of the run's updates. Above 1: the number of tokens."""
    weights: tuple[float, ...]
    """Share of each of data.paths in the batches; they need not sum to 1, and may be 0."""
    seq_len: int = 0
    """Tokens per sequence, a divisor of data.seq_len; 0 takes data.seq_len."""

    def __post_init__(self):
        check_types(self, "data.phases: ")
        require(
            0 < self.share < math.inf,
            f"data.phases: {self}: the share must be positive and finite",
        )
        require(
            not 1 < self.share <= 100,
            f"data.phases: {self}: a share is at most 1, as in {self.share / 100:g} for "
            f"{self.share:g}%; a number of tokens is above 100",
        )
        require(
            all(0 <= weight <= 1e18 for weight in self.weights) and any(self.weights),
            f"data.phases: {self}: weights must be from 0 to 1e18, and one must be positive",
        )
        require(self.seq_len >= 0, f"data.phases: {self}: the length must be positive")

    def __str__(self) -> str:
        length = f"@{self.seq_len}" if self.seq_len else ""
        return f"{_short(self.share)}{length}:{','.join(map(_short, self.weights))}"

    @staticmethod
    def parse(text: str) -> "Phase":
        """The inverse of `str`.

        Raises:
          InputError: `text` is no phase.
        """
        try:
            share, length, weights = re.fullmatch(r"([^@:]+)(?:@(\d+))?:(.+)", text).groups()
            numbers = tuple(map(float, weights.split(",")))
            share, length = float(share), int(length or 0)
        except (AttributeError, ValueError):
            raise InputError(
                f"data.phases: {text}: write SHARE:WEIGHT,WEIGHT,... as in 0.5:1,0, with "
                "SHARE@SEQ_LEN for shorter sequences, as in 0.5@128:1,0"
            ) from None
        return Phase(share=share, weights=numbers, seq_len=length)


def check_phases(
    phases: tuple[Phase, ...], *, num_paths: int, weights: tuple[float, ...], seq_len: int
) -> None:
    """Checks that phases fit the other fields of `data` and each other.

    Raises:
      InputError: they do not.
    """
    require(
        not (phases and weights),
        "data.phases with data.weights: each phase has weights of its own; remove data.weights",
    )
    for phase in phases:
        require(
            len(phase.weights) == num_paths,
            f"data.phases: {phase} has {len(phase.weights)} weights for {num_paths} data.paths: "
            "give one weight per path, 0 to leave one out",
        )
        require(
            seq_len % (phase.seq_len or seq_len) == 0,
            f"data.phases: {phase}: the length must divide data.seq_len={seq_len}, the longest of "
            "the run",
        )
    shares = [phase.share for phase in phases]
    require(
        len({share > 1 for share in shares}) < 2,
        f"data.phases: {' '.join(map(str, phases))}: give all of them shares of the run, up to 1, "
        "or all of them tokens",
    )
    total = sum(shares)
    require(
        not phases or shares[0] > 1 or abs(total - 1) < 0.0015,
        f"data.phases: {' '.join(map(str, phases))}: the shares add up to {total:g}; make it 1",
    )
    require(
        total <= 1e18,  # so that numbers of tokens fit into int64
        f"data.phases: {' '.join(map(str, phases))}: {total:g} tokens; 1e18 is the most",
    )


def _short(number: float) -> str:
    """The shortest text that gives the same number again."""
    return text if float(text := f"{number:g}") == number else repr(number)
