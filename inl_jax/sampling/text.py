"""Text to text: a trained model with its tokenizer."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from inl_jax.config import ModelConfig
from inl_jax.files import user_path
from inl_jax.model.platform.kernels import with_kernels_found_here
from inl_jax.parallel.sharding import on, param_shardings
from inl_jax.sampling.choice import Sampling
from inl_jax.sampling.continuation import Continuation, grown
from inl_jax.sampling.decoding import pieces, read_prompts
from inl_jax.storage.run_dir import read_config, read_tokenizer
from inl_jax.storage.weights import read_params
from inl_jax.tokens.tokenizer import Tokenizer

PIECE = 8
"""Tokens that come at once if the text is streamed, or may end at a stop string."""
LONGEST_PIECE = 1024
"""Tokens that come at once otherwise."""


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
        """The model of a run directory, wherever it was trained.

        A line says so if xla takes the place of a kernel that the run names and this device lacks.

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
        with on(mesh):
            config = with_kernels_found_here(config)
        _, params = read_params(run_dir, config, step=step, shardings=shardings)
        return cls(config, params, read_tokenizer(run_dir), mesh)

    def generate(self, prompts: str | Sequence[str], **settings: Any) -> str | list[str]:
        """The continuation of each prompt, without the prompt; one string for one string.

        Takes the settings of `continuations`. With `num_samples` above 1 the result is a list, with
        the samples of a prompt together.
        """
        single = isinstance(prompts, str)
        texts = [found.text for found in self.continuations(prompts, **settings)]
        return texts[0] if single and len(texts) == 1 else texts

    def stream(self, prompt: str, **settings: Any) -> Iterator[str]:
        """The continuation of a prompt, in pieces of whole characters as they come.

        Takes the settings of `grow`. The pieces together are what `generate` returns.
        """
        return (text.take() for (text,) in self.grow(prompt, **settings))

    def continuations(self, prompts: str | Sequence[str], **settings: Any) -> list[Continuation]:
        """The finished continuations of prompts: texts, numbers of tokens, why they end.

        Takes the settings of `grow`, and `num_samples` of each prompt, which is read once.
        """
        piece = PIECE if settings.get("stop") else LONGEST_PIECE
        *_, texts = self.grow(prompts, piece=piece, **settings)
        return texts

    def grow(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int,
        stop: str | Sequence[str] = (),
        num_samples: int = 1,
        seed: int = 0,
        ignore_end: bool = False,
        piece: int = PIECE,
        **sampling: Any,
    ) -> Iterator[list[Continuation]]:
        """Yields the continuations of all prompts each time that they have grown.

        A text is the same whatever the other prompts are and however many tokens come at once.

        Args:
          prompts: one or several. An empty prompt starts a new document.
          max_new_tokens: limit for each text.
          stop: a text ends before the first of these strings (that which is complete first).
          num_samples: continuations of each prompt, which is read once.
          seed: decides the draw.
          ignore_end: generate past the token that ends a document.
          piece: tokens that come at once.
          **sampling: the fields of `Sampling`.

        Raises:
          InputError: as `generate` for ids; or a stop string is empty.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        ids = [self.encode(prompt) for prompt in prompts]
        how, num_ids = Sampling(**sampling), self.tokenizer.vocab_size
        rows = read_prompts(
            self.config,
            self.params,
            ids,
            how,
            max_new_tokens=max_new_tokens,
            num_samples=num_samples,
            seed=seed,
            num_ids=num_ids,
            mesh=self.mesh,
        )
        texts = [
            Continuation(self.tokenizer, prompt, prompt_ids, limit=max_new_tokens, stop=stop)
            for prompt, prompt_ids in zip(prompts, ids, strict=True)
            for _ in range(num_samples)
        ]
        new = pieces(
            self.config,
            self.params,
            rows,
            how,
            size=min(piece, max_new_tokens),
            max_new_tokens=max_new_tokens,
            end_id=None if ignore_end else self.tokenizer.end_id,
            num_ids=num_ids,
            mesh=self.mesh,
        )
        return grown(texts, new)

    def encode(self, prompt: str) -> list[int]:
        """The ids of a prompt; of an empty one the end token, after which a document begins."""
        return self.tokenizer.encode(prompt).tolist() or [self.tokenizer.end_id]
