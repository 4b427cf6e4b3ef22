"""Texts, read by the integrators of a trained model."""

import itertools
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from inl_jax.config import InputError
from inl_jax.sampling import LanguageModel
from inl_jax.tokens.tokenizer import Tokenizer
from inl_jax.watch.integrator_probe import over_tokens, watch_tokens


class Inspected(NamedTuple):
    """What the integrators did with one text of S tokens."""

    prompt: str
    texts: list[str]
    """What each token says, from `token_texts`."""
    watched_LTS: dict[str, np.ndarray]
    """From `watch_tokens`, of one row: [L, T, S]."""

    @property
    def dynamics(self) -> dict[str, list[list[float | None]]]:
        """The same over all tokens, [L][T]."""
        return over_tokens(self.watched_LTS)


def inspect_prompts(model: LanguageModel, prompts: Sequence[str]) -> list[Inspected]:
    """Watches the integrators of a model, which has at least one iteration, read each prompt.

    An empty prompt is the start of a document.

    Raises:
      InputError: a prompt is longer than the model's longest sequence.
    """
    tokenizer, longest = model.tokenizer, model.config.max_seq_len
    rows = [tokenizer.encode(prompt).tolist() or [tokenizer.end_id] for prompt in prompts]
    for prompt, ids in zip(prompts, rows, strict=True):
        if len(ids) > longest:
            raise InputError(
                f"the prompt {prompt[:30]!r}... has {len(ids):,} tokens, and "
                f"model.max_seq_len={longest}: shorten it"
            )
    ids_BS = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, ids in zip(ids_BS, rows, strict=True):
        row[: len(ids)] = ids  # no token reads what follows it, so padding changes nothing
    watched = watch_tokens(model.config, model.params, ids_BS, mesh=model.mesh)
    return [
        Inspected(
            prompt,
            token_texts(tokenizer, ids),
            {name: values[:, :, b, : len(ids)] for name, values in watched.items()},
        )
        for b, (prompt, ids) in enumerate(zip(prompts, rows, strict=True))
    ]


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text. A character of several tokens belongs to the last one."""
    whole = tokenizer.decode(ids)
    ends = [0]
    for end in range(1, len(ids)):
        shared = os.path.commonprefix([tokenizer.decode(ids[:end]), whole])
        complete = shared.rstrip("\ufffd")  # perhaps a character that is not complete
        ends.append(max(ends[-1], len(complete)))
    return [whole[start:end] for start, end in itertools.pairwise([*ends, len(whole)])]
