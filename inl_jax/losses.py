"""Next-token cross-entropy."""

import jax
import jax.numpy as jnp

from inl_jax.model import logits


def token_losses(params, hidden_BSD, targets_BS) -> jax.Array:
    """Negative log-likelihood of every target, in nats, float32 [B, S].

    Args:
      params: the model's parameters, for the tied embedding.
      hidden_BSD: from `model.hidden_states`.
      targets_BS: the token that follows each position.
    """
    logits_BSV = logits(params, hidden_BSD)
    chosen_BS = jnp.take_along_axis(logits_BSV, targets_BS[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BSV, axis=-1) - chosen_BS
