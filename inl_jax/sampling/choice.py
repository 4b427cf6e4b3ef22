"""Which token comes next: a draw from the logits."""

import jax
import jax.numpy as jnp


def choose(logits_BV, keys_B, *, temperature, top_k: int, top_p) -> jax.Array:
    """One token per row, int32 [B].

    Args:
      logits_BV: float32 logits.
      keys_B: a key for each row.
      temperature: divides the logits; above 0.
      top_k: keep the k likeliest tokens; 0 keeps all. Ties with the k-th are kept.
      top_p: then keep the fewest tokens whose probabilities reach p (at least one, and all that
        are exactly as likely as the last); None keeps all.
    """
    # From the maximum down, so that a tiny temperature makes -inf and never inf.
    logits_BV = (logits_BV - logits_BV.max(axis=-1, keepdims=True)) / temperature
    if top_k > 0:
        kth_B1 = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
    if top_p is not None:
        sorted_BV = -jnp.sort(-logits_BV, axis=-1)
        probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
        least_B1 = jnp.min(jnp.where(before_BV < top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
