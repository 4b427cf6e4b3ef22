"""Next-token cross-entropy that never holds the logits of a whole batch.

Tokens go through the tied embedding in chunks. In training, the forward pass also computes the
gradient: the logits are computed once, and neither they nor their gradient are kept.

Shapes: B batch, S sequence, K positions of one chunk, n chunks, D width, V vocabulary, N shards of
the batch axis.
"""

import functools

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

CHUNK = 256  # tokens of each device whose logits exist at once
COLUMNS = 512  # columns of the embedding's gradient that are added at once


def token_losses(params, hidden_BSD, targets_BS, *, chunk: int = CHUNK) -> jax.Array:
    """Negative log-likelihood of every target, in nats, at least float32, [B, S].

    Args:
      params: the model's parameters; only the tied embedding is read.
      hidden_BSD: from `language_model.hidden_states`.
      targets_BS: the token that follows each position.
      chunk: tokens of each device whose logits exist at once; 0 takes all.
    """
    return _token_losses(embedding_rows(params["embedding"]), hidden_BSD, targets_BS, chunk)


def _token_losses(embedding_VD, hidden_BSD, targets_BS, chunk):
    # Without this checkpoint a backward pass would keep the logits of every chunk.
    losses = jax.checkpoint(lambda inputs: _negative_log_likelihood(embedding_VD, *inputs)[0])
    parts = _chunks((hidden_BSD, targets_BS), chunk)
    return join_positions(jax.lax.map(losses, parts), targets_BS.shape[1])


def mean_loss(params, hidden_BSD, targets_BS, *, chunk: int = CHUNK) -> jax.Array:
    """The mean of `token_losses`, whose gradient computes the logits once. For training.

    `chunk` counts tokens, as in `token_losses`.
    """
    weight_BS = jnp.full(targets_BS.shape, 1 / targets_BS.size, at_least_float32(hidden_BSD))
    embedding_VD = embedding_rows(params["embedding"])
    return _weighted_loss(embedding_VD, hidden_BSD, targets_BS, weight_BS, chunk)


def _negative_log_likelihood(embedding_VD, hidden_BKD, targets_BK):
    """The losses [B, K]; and the softmax as `exp(logits - max)` [B, K, V] and its sum [B, K, 1]."""
    logits_BKV = project(embedding_VD, hidden_BKD)
    top_BK1 = logits_BKV.max(axis=-1, keepdims=True)
    exp_BKV = jnp.exp(logits_BKV - top_BK1)
    sum_BK1 = exp_BKV.sum(axis=-1, keepdims=True)
    chosen_BK1 = jnp.take_along_axis(logits_BKV, targets_BK[..., None], axis=-1)
    return (jnp.log(sum_BK1) + top_BK1 - chosen_BK1)[..., 0], exp_BKV, sum_BK1


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _weighted_loss(embedding_VD, hidden_BSD, targets_BS, weight_BS, chunk):
    losses = _token_losses(embedding_VD, hidden_BSD, targets_BS, chunk)
    return jnp.sum(losses * weight_BS)


def _weighted_loss_forward(embedding_VD, hidden_BSD, targets_BS, weight_BS, chunk):
    (V, D), S, wide = embedding_VD.shape, targets_BS.shape[1], at_least_float32(hidden_BSD)
    N = current_batch_shards(len(targets_BS))
    kernel_VD = embedding_VD.astype(hidden_BSD.dtype)
    width = COLUMNS if D % COLUMNS == 0 else D

    def body(carry, inputs):
        loss_B, d_embedding_NVD = carry
        hidden_BKD, targets_BK, weight_BK = inputs
        losses_BK, exp_BKV, sum_BK1 = _negative_log_likelihood(kernel_VD, hidden_BKD, targets_BK)
        one_hot_BKV = targets_BK[..., None] == jnp.arange(V)
        d_logits_BKV = (exp_BKV / sum_BK1 - one_hot_BKV) * weight_BK[..., None]
        d_logits_BKV = d_logits_BKV.astype(hidden_BKD.dtype)
        d_hidden_BKD = d_logits_BKV @ kernel_VD
        by_shard = by_row_shard((d_logits_BKV, hidden_BKD), N)

        def add_columns(i, total_NVD):  # few at a time, because XLA allocates their product
            d_logits_NBKV, hidden_NBKD = by_shard
            columns = jax.lax.dynamic_slice_in_dim(hidden_NBKD, i * width, width, axis=-1)
            new = jnp.einsum("nbkv,nbkd->nvd", d_logits_NBKV, columns, preferred_element_type=wide)
            old = jax.lax.dynamic_slice_in_dim(total_NVD, i * width, width, axis=-1)
            return jax.lax.dynamic_update_slice_in_dim(total_NVD, old + new, i * width, axis=-1)

        d_embedding_NVD = jax.lax.fori_loop(0, D // width, add_columns, d_embedding_NVD)
        return (loss_B + jnp.sum(losses_BK * weight_BK, axis=1), d_embedding_NVD), d_hidden_BKD

    # A sum for each row, and one for each shard: devices exchange them once, after the last chunk.
    zero_B = jnp.zeros(len(targets_BS), wide)
    zero_NVD = nn.with_logical_constraint(
        jnp.zeros((N, V, D), wide), ("batch", "vocab", "activation")
    )
    (loss_B, d_embedding_NVD), d_hidden = jax.lax.scan(
        body, (zero_B, zero_NVD), _chunks((hidden_BSD, targets_BS, weight_BS), chunk)
    )
    d_embedding_VD = d_embedding_NVD.sum(axis=0).astype(embedding_VD.dtype)
    return loss_B.sum(), (d_embedding_VD, join_positions(d_hidden, S))


def _weighted_loss_backward(chunk, gradients, d_loss):
    del chunk
    d_embedding_VD, d_hidden_BSD = jax.tree.map(lambda g: (d_loss * g).astype(g.dtype), gradients)
    return d_embedding_VD, d_hidden_BSD, None, None


_weighted_loss.defvjp(_weighted_loss_forward, _weighted_loss_backward)


def _chunks(arrays, chunk: int):
    """Arrays [B, S, ...] as [n, B, K, ...], with about `chunk` tokens of each device in a chunk.

    The last chunk is zero-padded; padding has weight 0.
    """
    B, S = arrays[0].shape[:2]
    num_chunks = 1 if chunk == 0 else min(S, -(-B // current_batch_shards(B) * S // chunk))
    return jax.tree.map(lambda a: split_positions(a, -(-S // num_chunks)), arrays)
