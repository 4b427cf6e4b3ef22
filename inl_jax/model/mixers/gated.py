"""A linear recurrence whose decay depends on the token, with a gated output.

    n    = LN(x);  u = n Wc + bc
    lam  = sigmoid(d + n Wd)                  by token and channel; d starts as in `decay.py`
    h_i  = lam_i h_(i-1) + (1 - lam_i) u_i
    out  = (h * silu(n Wg)) Wo

The recurrence is the minimal gated recurrent unit of Feng et al. (2024, "Were RNNs all we
needed?"), and the gated output that of De et al. (2024, "Griffin").

Shapes: B batch, S tokens given, D width.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from inl_jax.config import ModelConfig
from inl_jax.model.layers import Layer, at_least_float32, compute_dtype, kept
from inl_jax.model.mixers.decay import decay_logit_init
from inl_jax.model.mixers.linear_scan import linear_scan
from inl_jax.model.mixers.mean import projection
from inl_jax.model.mixers.span import TokenSpan, last_real

init = nn.initializers


@jax.custom_vjp
def gated_scan(u_BSD, z_BSD, logit_D, h0_BD) -> jax.Array:
    """`h_i = lam_i h_(i-1) + (1 - lam_i) u_i` from `h_(-1) = h0`, with `lam = sigmoid(d + z)`.

    In parallel over S: [B, S, D] in the type of `logit_D` and `h0`, in which `h` is carried.
    """
    rest_BSD = jax.nn.sigmoid(-(logit_D + z_BSD))  # 1 - lam, exact where lam is almost 1
    lam_BSD, drive_BSD = 1 - rest_BSD, rest_BSD * u_BSD
    return linear_scan(lam_BSD, drive_BSD.at[:, 0].add(lam_BSD[:, 0] * h0_BD))


def _gated_scan_forward(u_BSD, z_BSD, logit_D, h0_BD):
    h_BSD = kept(gated_scan(u_BSD, z_BSD, logit_D, h0_BD))
    return h_BSD, (u_BSD, z_BSD, logit_D, h0_BD, h_BSD)


def _gated_scan_backward(residuals, dh_BSD):
    # The adjoint is a recurrence run backwards, g_i = dh_i + lam_(i+1) g_(i+1).
    u_BSD, z_BSD, logit_D, h0_BD, h_BSD = residuals
    # Without a barrier XLA writes lam, wider than z, in the forward pass and reads it here.
    z_BSD = jax.lax.optimization_barrier(z_BSD)
    rest_BSD = jax.nn.sigmoid(-(logit_D + z_BSD))
    next_BSD = jnp.pad(1 - rest_BSD[:, 1:], ((0, 0), (0, 1), (0, 0)))
    g_BSD = linear_scan(next_BSD[:, ::-1], dh_BSD[:, ::-1])[:, ::-1]
    du_BSD = rest_BSD * g_BSD
    dz_BSD = du_BSD * (h_BSD - u_BSD)  # h_i - u_i = lam_i (h_(i-1) - u_i)
    return (
        du_BSD.astype(u_BSD.dtype),
        dz_BSD.astype(z_BSD.dtype),
        dz_BSD.sum(axis=(0, 1)),
        (1 - rest_BSD[:, 0]) * g_BSD[:, 0],
    )


gated_scan.defvjp(_gated_scan_forward, _gated_scan_backward)


class GatedContext(Layer):
    """The gated recurrence, by channel. State: the last `h`, [B, D], at least float32."""

    @nn.compact
    def __call__(self, x_BSD, state, tokens: TokenSpan):
        """Maps the stream to (context, new state)."""
        c, D = self.config, self.config.d_model
        n_BSD = self.norm("norm", x_BSD)
        u_BSD = projection(self, n_BSD)
        dtype = at_least_float32(u_BSD)
        fan_in, by_channel = init.normal(D**-0.5), ("embed", "channels")
        decay_kernel = self.declare("decay_kernel", fan_in, (D, D), by_channel)
        gate_kernel = self.declare("gate_kernel", fan_in, (D, D), by_channel)
        logit_D = self.declare("decay_logit", decay_logit_init(c), (D,), ("channels",), dtype)
        scaled = init.normal((2 * c.num_layers * D) ** -0.5)
        out_kernel = self.declare("out_kernel", scaled, (D, D), ("channels", "embed"))

        z_BSD = kept(n_BSD @ decay_kernel)
        h0_BD = jnp.zeros_like(u_BSD[:, 0], dtype) if state is None else state["h"]
        h_BSD = gated_scan(u_BSD, z_BSD, logit_D, h0_BD)
        gate_BSD = jax.nn.silu(kept(n_BSD @ gate_kernel))
        out_BSD = kept((h_BSD.astype(u_BSD.dtype) * gate_BSD) @ out_kernel)
        return out_BSD, None if state is None else {"h": last_real(h_BSD, tokens)}

    @staticmethod
    def state_shapes(config: ModelConfig, batch_size: int, max_len: int):
        """Shapes and types of the state."""
        del max_len
        dtype = at_least_float32(compute_dtype(config))
        return {"h": jax.ShapeDtypeStruct((batch_size, config.d_model), dtype)}
