"""Next-token cross-entropy that never holds the logits of a whole batch.

Tokens go through the tied embedding in chunks. In training, the forward pass also computes the
gradient: the logits are computed once, and neither they nor their gradient are kept.

Shapes: B batch, S sequence, K positions of one chunk, n chunks, D width, V vocabulary, P the padded
one, N shards of the batch axis.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from inl_jax.model.layers import at_least_float32, embedding_rows, project
from inl_jax.model.params import (
    by_row_shard,
    current_batch_shards,
    join_positions,
    split_positions,
)
from inl_jax.model.platform.device import current_device

COLUMNS = 512  # columns of the embedding's gradient that are added at once
ROWS = 128  # the vocabulary is padded to a multiple of this, but on CPUs

Chunk = int | Literal["auto"]
"""Tokens of one device whose logits exist at once; 0 takes all, auto decides by the device."""


def chunk_tokens(chunk: Chunk, vocab_size: int, num_tokens: int) -> int:
    """Tokens of a device whose logits exist at once.

    auto: on a CPU 256, or more if their float32 logits are still at most 1 MiB: loops cost time. On
    other devices 2048, since every chunk reads and writes the float32 gradient of the embedding; or
    fewer if the vocabulary is large, for at most 512 MiB of float32 logits.

    Args:
      chunk: as configured.
      vocab_size: of the model.
      num_tokens: of a micro-batch on one device.
    """
    if chunk == "auto":
        cpu = current_device().platform == "cpu"
        chunk = max(256, 2**18 // vocab_size) if cpu else min(2048, 2**27 // vocab_size)
    return min(chunk or num_tokens, num_tokens)


def token_losses(params, hidden_BSD, targets_BS, *, chunk: Chunk = "auto") -> jax.Array:
    """Negative log-likelihood of every target, in nats, at least float32, [B, S].

    Args:
      params: the model's parameters; only the tied embedding is read.
      hidden_BSD: from `language_model.hidden_states`.
      targets_BS: the token that follows each position.
      chunk: tokens of each device whose logits exist at once; see `chunk_tokens`.
    """
    V, embedding_PD = len(params["embedding"]), _padded_rows(params["embedding"])
    return _token_losses(embedding_PD, hidden_BSD, targets_BS, V, chunk)


def _padded_rows(embedding_VD):
    """The embedding for `project` with P rows, zeros at its end.

    For products of another size XLA would copy the embedding to a padded one, in every chunk.
    """
    rows = 1 if current_device().platform == "cpu" else ROWS
    return embedding_rows(jnp.pad(embedding_VD, ((0, -len(embedding_VD) % rows), (0, 0))))


def _token_losses(embedding_PD, hidden_BSD, targets_BS, V, chunk):
    # Without this checkpoint a backward pass would keep the logits of every chunk.
    losses = jax.checkpoint(lambda inputs: _negative_log_likelihood(embedding_PD, *inputs, V)[0])
    parts = _chunks((hidden_BSD, targets_BS), V, chunk)
    return join_positions(jax.lax.map(losses, parts), targets_BS.shape[1])


def mean_loss(params, hidden_BSD, targets_BS, *, chunk: Chunk = "auto") -> jax.Array:
    """The mean of `token_losses`, whose gradient computes the logits once. For training.

    `chunk` counts tokens, as in `token_losses`.
    """
    weight_BS = jnp.full(targets_BS.shape, 1 / targets_BS.size, at_least_float32(hidden_BSD))
    V, embedding_PD = len(params["embedding"]), _padded_rows(params["embedding"])
    return _weighted_loss(embedding_PD, hidden_BSD, targets_BS, weight_BS, V, chunk)


def _negative_log_likelihood(embedding_PD, hidden_BKD, targets_BK, V):
    """The losses [B, K]; and the softmax as `exp(logits - max)` [B, K, P] and its sum [B, K, 1]."""
    logits_BKP = project(embedding_PD, hidden_BKD)
    P = len(embedding_PD)
    if P > V:
        logits_BKP = jnp.where(jnp.arange(P) < V, logits_BKP, -jnp.inf)
    top_BK1 = logits_BKP.max(axis=-1, keepdims=True)
    exp_BKP = jnp.exp(logits_BKP - top_BK1)
    sum_BK1 = exp_BKP.sum(axis=-1, keepdims=True)
    chosen_BK1 = jnp.take_along_axis(logits_BKP, targets_BK[..., None], axis=-1)
    return (jnp.log(sum_BK1) + top_BK1 - chosen_BK1)[..., 0], exp_BKP, sum_BK1


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _weighted_loss(embedding_PD, hidden_BSD, targets_BS, weight_BS, V, chunk):
    losses = _token_losses(embedding_PD, hidden_BSD, targets_BS, V, chunk)
    return jnp.sum(losses * weight_BS)


def _weighted_loss_forward(embedding_PD, hidden_BSD, targets_BS, weight_BS, V, chunk):
    (P, D), S, wide = embedding_PD.shape, targets_BS.shape[1], at_least_float32(hidden_BSD)
    N = current_batch_shards(len(targets_BS))
    kernel_PD = embedding_PD.astype(hidden_BSD.dtype)
    width = COLUMNS if D % COLUMNS == 0 else D

    def body(carry, inputs):
        loss_B, d_embedding_NPD = carry
        hidden_BKD, targets_BK, weight_BK = inputs
        losses_BK, exp_BKP, sum_BK1 = _negative_log_likelihood(kernel_PD, hidden_BKD, targets_BK, V)
        one_hot_BKP = targets_BK[..., None] == jnp.arange(P)
        d_logits_BKP = (exp_BKP / sum_BK1 - one_hot_BKP) * weight_BK[..., None]
        d_logits_BKP = d_logits_BKP.astype(hidden_BKD.dtype)
        d_hidden_BKD = d_logits_BKP @ kernel_PD
        by_shard = by_row_shard((d_logits_BKP, hidden_BKD), N)

        def add_columns(i, total_NPD):  # few at a time, because XLA allocates their product
            d_logits_NBKP, hidden_NBKD = by_shard
            columns = jax.lax.dynamic_slice_in_dim(hidden_NBKD, i * width, width, axis=-1)
            new = jnp.einsum("nbkp,nbkd->npd", d_logits_NBKP, columns, preferred_element_type=wide)
            old = jax.lax.dynamic_slice_in_dim(total_NPD, i * width, width, axis=-1)
            return jax.lax.dynamic_update_slice_in_dim(total_NPD, old + new, i * width, axis=-1)

        d_embedding_NPD = jax.lax.fori_loop(0, D // width, add_columns, d_embedding_NPD)
        return (loss_B + jnp.sum(losses_BK * weight_BK, axis=1), d_embedding_NPD), d_hidden_BKD

    # A sum for each row, and one for each shard: devices exchange them once, after the last chunk.
    zero_B = jnp.zeros(len(targets_BS), wide)
    zero_NPD = nn.with_logical_constraint(
        jnp.zeros((N, P, D), wide), ("batch", "vocab", "activation")
    )
    (loss_B, d_embedding_NPD), d_hidden = jax.lax.scan(
        body, (zero_B, zero_NPD), _chunks((hidden_BSD, targets_BS, weight_BS), V, chunk)
    )
    d_embedding_PD = d_embedding_NPD.sum(axis=0).astype(embedding_PD.dtype)
    return loss_B.sum(), (d_embedding_PD, join_positions(d_hidden, S))


def _weighted_loss_backward(V, chunk, gradients, d_loss):
    del V, chunk
    d_embedding_PD, d_hidden_BSD = jax.tree.map(lambda g: (d_loss * g).astype(g.dtype), gradients)
    return d_embedding_PD, d_hidden_BSD, None, None


_weighted_loss.defvjp(_weighted_loss_forward, _weighted_loss_backward)


def _chunks(arrays, V: int, chunk: Chunk):
    """Arrays [B, S, ...] as [n, B, K, ...], with about `chunk` tokens of each device in a chunk.

    The last chunk is zero-padded; padding has weight 0.
    """
    B, S = arrays[0].shape[:2]
    num_tokens = B // current_batch_shards(B) * S
    num_chunks = min(S, -(-num_tokens // chunk_tokens(chunk, V, num_tokens)))
    return jax.tree.map(lambda a: split_positions(a, -(-S // num_chunks)), arrays)
