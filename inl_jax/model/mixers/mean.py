"""The running mean, the published model's context.

Shapes: B batch, S tokens given, D width.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from inl_jax.config import ModelConfig
from inl_jax.model.layers import Layer, at_least_float32, compute_dtype, kept
from inl_jax.model.mixers.span import TokenSpan, last_real

init = nn.initializers


def running_mean(u_BSD, sum_BD, tokens: TokenSpan) -> tuple[jax.Array, jax.Array]:
    """`h_i = mean(u_0 .. u_i)` and the new sum, given the sum over the earlier tokens.

    Sums have the type of `sum_BD`.
    """
    total_BSD = jnp.cumsum(u_BSD.astype(sum_BD.dtype), axis=1) + sum_BD[:, None]
    mean_BSD = total_BSD / (tokens.position_BS[..., None] + 1).astype(total_BSD.dtype)
    return mean_BSD.astype(u_BSD.dtype), last_real(total_BSD, tokens)


class MeanContext(Layer):
    """Running mean of a projection. State: the sum so far, [B, D], at least float32."""

    @nn.compact
    def __call__(self, n_BSD, state, tokens: TokenSpan):
        """Maps the normalised stream to (context, new state)."""
        u_BSD = projection(self, n_BSD)
        if state is None:
            zero_BD = jnp.zeros_like(u_BSD[:, 0], at_least_float32(u_BSD))
            return running_mean(u_BSD, zero_BD, tokens)[0], None
        h_BSD, sum_BD = running_mean(u_BSD, state["sum"], tokens)
        return h_BSD, {"sum": sum_BD}

    @staticmethod
    def state_shapes(config: ModelConfig, batch_size: int, max_len: int):
        """Shapes and types of the state."""
        del max_len
        dtype = at_least_float32(compute_dtype(config))
        return {"sum": jax.ShapeDtypeStruct((batch_size, config.d_model), dtype)}


def projection(layer: Layer, n_BSD) -> jax.Array:
    """`u = n Wc + bc`, the input of mean, decay and gated."""
    D = layer.config.d_model
    kernel = layer.declare("kernel", init.normal(D**-0.5), (D, D), ("embed", "channels"))
    return kept(n_BSD @ kernel + layer.declare("bias", init.zeros, (D,), ("channels",)))
