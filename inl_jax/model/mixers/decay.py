"""Exponential decay with a learned rate per channel.

Shapes: B batch, S tokens given, D width.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from inl_jax.config import ModelConfig
from inl_jax.model.layers import Layer, at_least_float32, compute_dtype, kept
from inl_jax.model.mixers.linear_scan import linear_scan
from inl_jax.model.mixers.mean import projection
from inl_jax.model.mixers.span import TokenSpan, last_real


@jax.custom_vjp
def decay_scan(u_BSD, decay_D, h0_BD) -> jax.Array:
    """`h_i = decay h_(i-1) + (1 - decay) u_i` from `h_(-1) = h0`, in parallel over S: [B, S, D].

    The three arguments must have one type, in which `h` is carried.
    """
    drive_BSD = ((1 - decay_D) * u_BSD).at[:, 0].add(decay_D * h0_BD)
    return linear_scan(decay_D, drive_BSD)


def _decay_scan_forward(u_BSD, decay_D, h0_BD):
    h_BSD = kept(decay_scan(u_BSD, decay_D, h0_BD))
    return h_BSD, (u_BSD, decay_D, h0_BD, h_BSD)


def _decay_scan_backward(residuals, dh_BSD):
    # The adjoint is the same recurrence run backwards, g_i = dh_i + decay g_(i+1).
    u_BSD, decay_D, h0_BD, h_BSD = residuals
    g_BSD = linear_scan(decay_D, dh_BSD[:, ::-1])[:, ::-1]
    earlier_BSD = jnp.concatenate([h0_BD[:, None], h_BSD[:, :-1]], axis=1)
    d_decay_D = jnp.sum(g_BSD * (earlier_BSD - u_BSD), axis=(0, 1))
    return (1 - decay_D) * g_BSD, d_decay_D, decay_D * g_BSD[:, 0]


decay_scan.defvjp(_decay_scan_forward, _decay_scan_backward)


class DecayContext(Layer):
    """Exponential decay of a projection, by channel. State: the last context, [B, D]."""

    @nn.compact
    def __call__(self, x_BSD, state, tokens: TokenSpan):
        """Maps the stream to (context, new state)."""
        u_BSD = projection(self, self.norm("norm", x_BSD))
        dtype = at_least_float32(u_BSD)
        logit_D = self.declare(
            "decay_logit", decay_logit_init(self.config), u_BSD.shape[-1:], ("channels",), dtype
        )
        h0_BD = jnp.zeros_like(u_BSD[:, 0], dtype) if state is None else state["h"]
        h_BSD = decay_scan(u_BSD.astype(dtype), jax.nn.sigmoid(logit_D), h0_BD)
        new_state = None if state is None else {"h": last_real(h_BSD, tokens)}
        return h_BSD.astype(u_BSD.dtype), new_state

    @staticmethod
    def state_shapes(config: ModelConfig, batch_size: int, max_len: int):
        """Shapes and types of the state."""
        del max_len
        dtype = at_least_float32(compute_dtype(config))
        return {"h": jax.ShapeDtypeStruct((batch_size, config.d_model), dtype)}


def decay_logit_init(config: ModelConfig):
    """Time constants `tau = -1 / ln(lam)`, spread geometrically from 1 to `max_seq_len` tokens."""

    def initializer(key, shape, dtype):
        del key
        tau = jnp.geomspace(1.0, config.max_seq_len, shape[0])
        return -jnp.log(jnp.expm1(1 / tau)).astype(dtype)  # logit(exp(-1 / tau))

    return initializer
