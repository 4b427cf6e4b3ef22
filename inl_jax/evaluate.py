"""Loss, perplexity and bits per byte of a model on a validation split."""

import functools
import math
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from inl_jax.config import InputError, ModelConfig
from inl_jax.corpus import Corpus
from inl_jax.data import EvalBatch
from inl_jax.losses import token_losses
from inl_jax.metrics import perplexity
from inl_jax.model import hidden_states


class Evaluation(NamedTuple):
    """What `evaluate` finds."""

    loss: float  # nats per token
    perplexity: float
    bits_per_byte: float  # comparable between tokenizers
    tokens: int
    seconds: float  # without compilation


@functools.partial(jax.jit, static_argnums=0)
def eval_step(config: ModelConfig, params, batch: EvalBatch) -> jax.Array:
    """Summed loss of the weighted targets of each row, float32 [B]."""
    losses_BS = token_losses(params, hidden_states(config, params, batch.inputs), batch.targets)
    return jnp.sum(losses_BS * batch.weights, axis=1)


def tokens_per_byte(corpus: Corpus) -> float:
    """Validation tokens, end tokens included, per byte of validation text."""
    tokens = sum(files.validation_tokens for files in corpus.sources)
    return tokens / max(1, sum(files.validation_bytes for files in corpus.sources))


def evaluate(
    config: ModelConfig, params: Any, batches: Iterable[EvalBatch], *, tokens_per_byte: float,
    place=jnp.asarray,
) -> Evaluation:  # fmt: skip
    """Evaluates over all of `batches`; the same number every time and for every batch size.

    Args:
      config: the architecture.
      params: its parameters.
      batches: from `data.eval_batches`.
      tokens_per_byte: of the text they come from, for bits per byte.
      place: puts a host array on the devices.

    Raises:
      InputError: there is nothing to evaluate on.
    """
    total, tokens, seconds, row_losses = 0.0, 0, 0.0, None
    for batch in batches:
        placed = EvalBatch(*map(place, batch))
        if row_losses is None:
            jax.block_until_ready(eval_step(config, params, placed))  # compiles
        start = time.perf_counter()
        row_losses = np.asarray(eval_step(config, params, placed), np.float64)
        seconds += time.perf_counter() - start
        total += row_losses.sum()  # in float64, so that the batch size does not show
        tokens += int(batch.weights.sum())
    if tokens == 0:
        raise InputError("no tokens to evaluate on: raise data.validation_fraction or add text")
    loss = total / tokens
    bits_per_byte = loss * tokens_per_byte / math.log(2)
    return Evaluation(loss, perplexity(loss), bits_per_byte, tokens, seconds)
