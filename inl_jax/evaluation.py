"""Loss, perplexity and bits per byte of a model on a validation split."""

import collections
import functools
import math
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from inl_jax.config import DataConfig, InputError, ModelConfig
from inl_jax.data.batches import EvalBatch
from inl_jax.model.language_model import hidden_states_and_steps
from inl_jax.model.losses import Chunk, token_losses
from inl_jax.parallel.processes import call_together
from inl_jax.parallel.sharding import fetch, local_rows, on, place
from inl_jax.training.metrics import Record, perplexity


class Score(NamedTuple):
    """How well a model predicts a text."""

    loss: float  # nats per token
    perplexity: float
    bits_per_byte: float  # comparable between tokenizers
    tokens: int


class Evaluation(NamedTuple):
    """What `evaluate` finds."""

    loss: float  # as in `Score`, over all of the text
    perplexity: float
    bits_per_byte: float
    tokens: int
    seconds: float  # without compilation
    steps_per_token: float  # of the integrator in a block; the mean over blocks and tokens
    sources: dict[int, Score]  # each source of the corpus alone, by its index


@functools.partial(jax.jit, static_argnames=("config", "loss_chunk"))
def eval_step(config: ModelConfig, params, inputs, targets, weights, *, loss_chunk: Chunk):
    """Sums over the weighted targets of each row, float32 [B, 2]. Arguments: [B, S].

    They are the loss, in nats, and the steps of the integrator in all blocks.
    """
    hidden_BSD, steps_LBS = hidden_states_and_steps(config, params, inputs)
    losses_BS = token_losses(params, hidden_BSD, targets, chunk=loss_chunk)
    both_BS2 = jnp.stack([losses_BS, steps_LBS.sum(axis=0)], axis=-1)
    return jnp.sum(both_BS2 * weights[..., None], axis=1)


def evaluate(
    config: ModelConfig,
    params: Any,
    batches: Iterable[EvalBatch],
    *,
    mesh: Mesh | None = None,
    loss_chunk: Chunk = "auto",
) -> Evaluation:
    """Evaluates a model over all of `batches`. The result does not depend on the batch size.

    Args:
      config: the architecture.
      params: its parameters; if there is a mesh, sharded over it.
      batches: from `eval_batches`, of a batch size that is a multiple of `batch_shards(mesh)`.
      mesh: from `make_mesh`; None for a single device.
      loss_chunk: tokens of one device whose logits exist at once, as in TrainConfig.

    Raises:
      InputError: there is nothing to evaluate on.
    """

    def placed(array: np.ndarray) -> jax.Array:
        if mesh is None:
            return jnp.asarray(array)
        return place(mesh, array[local_rows(mesh, len(array))])

    step = functools.partial(eval_step, config, params, loss_chunk=loss_chunk)
    # By source: nats, steps, tokens, bytes; in float64, so that the batch size does not show.
    sums: dict[int, np.ndarray] = collections.defaultdict(lambda: np.zeros(4))
    seconds, row_sums = 0.0, None
    with on(mesh):
        for batch in batches:
            arrays = [placed(a) for a in (batch.inputs, batch.targets, batch.weights)]
            if row_sums is None:
                # Outside the time: it compiles.
                fetch(call_together(eval_step, config, params, *arrays, loss_chunk=loss_chunk))
            start = time.perf_counter()
            row_sums = fetch(step(*arrays))
            seconds += time.perf_counter() - start
            rows = np.column_stack([row_sums, batch.weights.sum(axis=1), batch.num_bytes])
            for source in np.unique(batch.source):
                sums[int(source)] += rows[batch.source == source].sum(axis=0, dtype=np.float64)
    nats, steps, tokens, num_bytes = sum(sums.values(), np.zeros(4))
    if tokens == 0:
        raise InputError(
            "no tokens to evaluate on: raise data.validation_fraction before training, or name "
            "text for inl evaluate by --data"
        )
    sources = {
        source: _score(nats, tokens, num_bytes)
        for source, (nats, _, tokens, num_bytes) in sorted(sums.items())
        if tokens
    }
    steps_per_token = float(steps / tokens / config.num_layers)
    return Evaluation(*_score(nats, tokens, num_bytes), seconds, steps_per_token, sources)


def _score(nats: float, tokens: float, num_bytes: float) -> Score:
    loss = float(nats / tokens)
    bits_per_byte = float(nats) / max(float(num_bytes), 1e-9) / math.log(2)
    return Score(loss, perplexity(loss), bits_per_byte, int(tokens))


def scores_by_name(found: Evaluation, data: DataConfig) -> dict[str, dict[str, float]]:
    """The scores of each source by its path; empty if the text is one source."""
    if len(found.sources) < 2:
        return {}
    return {data.paths[source]: score._asdict() for source, score in found.sources.items()}


def validation_record(found: Evaluation, data: DataConfig, step: int, num_steps: int) -> Record:
    """The record of an evaluation in training."""
    sources = scores_by_name(found, data)
    return ({"sources": sources} if sources else {}) | {
        "step": step,
        "num_steps": num_steps,
        "validation_loss": found.loss,
        "validation_perplexity": found.perplexity,
        "validation_bits_per_byte": found.bits_per_byte,
        "validation_tokens": found.tokens,
    }
