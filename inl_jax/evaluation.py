"""Loss, perplexity and bits per byte of a model on a validation split."""

import functools
import math
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from inl_jax.config import InputError, ModelConfig
from inl_jax.data.batches import EvalBatch
from inl_jax.model.language_model import hidden_states
from inl_jax.model.losses import CHUNK, token_losses
from inl_jax.parallel.sharding import fetch, local_rows, on, place
from inl_jax.training.metrics import Record, perplexity


class Evaluation(NamedTuple):
    """What `evaluate` finds."""

    loss: float  # nats per token
    perplexity: float
    bits_per_byte: float  # comparable between tokenizers
    tokens: int
    seconds: float  # without compilation


@functools.partial(jax.jit, static_argnames=("config", "loss_chunk"))
def eval_step(config: ModelConfig, params, batch: EvalBatch, *, loss_chunk: int) -> jax.Array:
    """Summed loss of the weighted targets of each row, in nats, float32 [B]."""
    hidden_BSD = hidden_states(config, params, batch.inputs)
    losses_BS = token_losses(params, hidden_BSD, batch.targets, chunk=loss_chunk)
    return jnp.sum(losses_BS * batch.weights, axis=1)


def evaluate(
    config: ModelConfig,
    params: Any,
    batches: Iterable[EvalBatch],
    *,
    mesh: Mesh | None = None,
    loss_chunk: int = CHUNK,
) -> Evaluation:
    """Evaluates a model over all of `batches`. The result does not depend on the batch size.

    Args:
      config: the architecture.
      params: its parameters; if there is a mesh, sharded over it.
      batches: from `eval_batches`, of a batch size that is a multiple of `batch_shards(mesh)`.
      mesh: from `make_mesh`; None for a single device.
      loss_chunk: tokens of one device whose logits exist at once; 0 takes all.

    Raises:
      InputError: there is nothing to evaluate on.
    """

    def placed(array: np.ndarray) -> jax.Array:
        if mesh is None:
            return jnp.asarray(array)
        return place(mesh, array[local_rows(mesh, len(array))])

    step = functools.partial(eval_step, config, params, loss_chunk=loss_chunk)
    total, tokens, num_bytes, seconds, row_losses = 0.0, 0, 0.0, 0.0, None
    with on(mesh):
        for batch in batches:
            on_devices = EvalBatch(*map(placed, batch))
            if row_losses is None:
                jax.block_until_ready(step(on_devices))  # compiles
            start = time.perf_counter()
            row_losses = fetch(step(on_devices)).astype(np.float64)
            seconds += time.perf_counter() - start
            total += float(row_losses.sum())  # in float64, so that the batch size does not show
            tokens += int(batch.weights.sum())
            num_bytes += float(batch.num_bytes.sum(dtype=np.float64))
    if tokens == 0:
        raise InputError("no tokens to evaluate on: raise data.validation_fraction or add text")
    loss = total / tokens
    bits_per_byte = total / max(num_bytes, 1e-9) / math.log(2)
    return Evaluation(loss, perplexity(loss), bits_per_byte, tokens, seconds)


def validation_record(found: Evaluation, step: int, num_steps: int) -> Record:
    """The record of an evaluation in training."""
    return {
        "step": step,
        "num_steps": num_steps,
        "validation_loss": found.loss,
        "validation_perplexity": found.perplexity,
        "validation_bits_per_byte": found.bits_per_byte,
        "validation_tokens": found.tokens,
    }
