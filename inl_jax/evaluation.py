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
from inl_jax.data.batches import EvalBatch
from inl_jax.model.language_model import hidden_states
from inl_jax.model.losses import token_losses
from inl_jax.parallel.sharding import fetch
from inl_jax.training.metrics import perplexity


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


def evaluate(
    config: ModelConfig, params: Any, batches: Iterable[EvalBatch], *, place=jnp.asarray
) -> Evaluation:
    """Evaluates over all of `batches`; the same number every time and for every batch size.

    Args:
      config: the architecture.
      params: its parameters.
      batches: from `data.eval_batches`.
      place: puts a host array on the devices.

    Raises:
      InputError: there is nothing to evaluate on.
    """
    total, tokens, num_bytes, seconds, row_losses = 0.0, 0, 0.0, 0.0, None
    for batch in batches:
        placed = EvalBatch(*map(place, batch))
        if row_losses is None:
            jax.block_until_ready(eval_step(config, params, placed))  # compiles
        start = time.perf_counter()
        row_losses = fetch(eval_step(config, params, placed)).astype(np.float64)
        seconds += time.perf_counter() - start
        total += row_losses.sum()  # in float64, so that the batch size does not show
        tokens += int(batch.weights.sum())
        num_bytes += batch.num_bytes.sum(dtype=np.float64)
    if tokens == 0:
        raise InputError("no tokens to evaluate on: raise data.validation_fraction or add text")
    loss = total / tokens
    bits_per_byte = total / max(num_bytes, 1e-9) / math.log(2)
    return Evaluation(loss, perplexity(loss), bits_per_byte, tokens, seconds)
