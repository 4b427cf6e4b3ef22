"""Text to text: a trained model with its tokenizer."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from inl_jax.config import ModelConfig
from inl_jax.files import user_path
from inl_jax.parallel.sharding import param_shardings
from inl_jax.sampling.decoding import generate
from inl_jax.storage.run_dir import read_config, read_tokenizer
from inl_jax.storage.weights import read_params
from inl_jax.tokens.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A trained model with its tokenizer: text in, text out."""

    config: ModelConfig
    params: Any = dataclasses.field(repr=False)
    tokenizer: Tokenizer = dataclasses.field(repr=False)
    mesh: Mesh | None = None
    """Over which the parameters are sharded; None for a single device."""

    @classmethod
    def from_run(
        cls, run_dir: str | Path, *, step: int | str = "latest", mesh: Mesh | None = None
    ) -> "LanguageModel":
        """The model of a run directory.

        Args:
          run_dir: the run.
          step: a saved update, "latest", or "best" (by validation loss).
          mesh: to shard the parameters over; None for a single device.

        Raises:
          InputError: there is no such run or checkpoint, or the model does not fit the mesh.
        """
        run_dir = user_path(run_dir, "run_dir")
        config = read_config(run_dir).model
        shardings = None if mesh is None else param_shardings(mesh, config)
        _, params = read_params(run_dir, config, step=step, shardings=shardings)
        return cls(config, params, read_tokenizer(run_dir), mesh)

    def generate(self, prompts: str | Sequence[str], **settings: Any) -> str | list[str]:
        """The continuation of each prompt, without the prompt; one string for one string.

        Takes the settings of `generate`. An empty prompt starts a new document.
        """
        several = not isinstance(prompts, str)
        ids = [
            self.tokenizer.encode(prompt).tolist() or [self.tokenizer.end_id]
            for prompt in (prompts if several else [prompts])
        ]
        known = {"end_id": self.tokenizer.end_id, "num_ids": self.tokenizer.vocab_size}
        settings = known | {"mesh": self.mesh} | settings
        rows = generate(self.config, self.params, ids, **settings)
        texts = [
            self.tokenizer.decode_after(*continued)
            for continued in zip(prompts if several else [prompts], ids, rows, strict=True)
        ]
        return texts if several else texts[0]
