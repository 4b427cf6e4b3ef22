"""What `train` returns."""

import dataclasses
from typing import Any, Literal

import jax

from inl_jax.config import TrainConfig
from inl_jax.sampling import LanguageModel
from inl_jax.tokens.tokenizer import Tokenizer
from inl_jax.training.metrics import Record


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """A run as it ended: its parameters, tokenizer and records."""

    config: TrainConfig
    params: Any = dataclasses.field(repr=False)
    tokenizer: Tokenizer = dataclasses.field(repr=False)
    history: list[Record] = dataclasses.field(repr=False)  # of the whole run, in order of updates
    step: int
    ended: Literal["complete", "interrupted", "stopped early"]

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended the run; the same call resumes it."""
        return self.ended == "interrupted"

    @property
    def model(self) -> LanguageModel:
        """The trained model, ready to generate, on the mesh of the run."""
        placed = jax.tree.leaves(self.params)[0].sharding
        mesh = getattr(placed, "mesh", None)  # arrays that were pickled are on one device
        return LanguageModel(self.config.model, self.params, self.tokenizer, mesh)
