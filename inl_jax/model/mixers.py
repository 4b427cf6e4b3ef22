"""The three context mixers, which bring the earlier positions into a block.

    mean       h_i = mean(u_0 .. u_i),  u = n Wc + bc                       the published block
    decay      h_i = lam h_(i-1) + (1 - lam) u_i,  u = LN(x) Wc + bc,  lam = sigmoid(d)
    attention  h = Attention(LN(x)): grouped queries, rotary positions, normalised q and k

A mixer maps (stream, state, tokens) to (context, new state). The state is what decoding keeps of
the earlier tokens, zero before the first; in training it is None. A new mixer is a module here, and
an entry in `MIXERS`.

Shapes: B batch, S tokens given, D width, H query heads, G key-value heads, K head width, N entries
of the key-value cache.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from inl_jax.config import ModelConfig
from inl_jax.model.layers import (
    Layer,
    at_least_float32,
    attend,
    attention_kernel,
    compute_dtype,
    rms_norm,
    rotate,
)

init = nn.initializers


class TokenSpan(NamedTuple):
    """Where the tokens given to a block stand in their sequences."""

    position_BS: jax.Array  # of every token in its sequence, int32
    length_B: jax.Array | None  # number of real tokens; the rest is padding on the right


def last_real(h_BSD, tokens: TokenSpan) -> jax.Array:
    """The vector at the last real token of each row, [B, D]."""
    if tokens.length_B is None:
        return h_BSD[:, -1]
    return jnp.take_along_axis(h_BSD, (tokens.length_B - 1)[:, None, None], axis=1)[:, 0]


# --- mean


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
        u_BSD = _projection(self, n_BSD)
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


# --- decay


@jax.custom_vjp
def decay_scan(u_BSD, decay_D, h0_BD) -> jax.Array:
    """`h_i = decay h_(i-1) + (1 - decay) u_i` from `h_(-1) = h0`, in parallel over S: [B, S, D].

    The three arguments must have one type, in which `h` is carried.
    """
    drive_BSD = ((1 - decay_D) * u_BSD).at[:, 0].add(decay_D * h0_BD)
    return _linear_scan(decay_D, drive_BSD)


def _linear_scan(decay_D, drive_BSD, *, reverse: bool = False):
    """`h_i = decay h_(i-1) + drive_i` from 0, or from the end if `reverse`."""

    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    decay_BSD = jnp.broadcast_to(decay_D, drive_BSD.shape)
    return jax.lax.associative_scan(combine, (decay_BSD, drive_BSD), reverse=reverse, axis=1)[1]


def _decay_scan_forward(u_BSD, decay_D, h0_BD):
    h_BSD = decay_scan(u_BSD, decay_D, h0_BD)
    return h_BSD, (u_BSD, decay_D, h0_BD, h_BSD)


def _decay_scan_backward(residuals, dh_BSD):
    # The adjoint is the same recurrence run backwards, g_i = dh_i + decay g_(i+1). Automatic
    # differentiation of the associative scan takes more time and memory (docs/LOG.md).
    u_BSD, decay_D, h0_BD, h_BSD = residuals
    g_BSD = _linear_scan(decay_D, dh_BSD, reverse=True)
    earlier_BSD = jnp.concatenate([h0_BD[:, None], h_BSD[:, :-1]], axis=1)
    d_decay_D = jnp.sum(g_BSD * (earlier_BSD - u_BSD), axis=(0, 1))
    return (1 - decay_D) * g_BSD, d_decay_D, decay_D * g_BSD[:, 0]


decay_scan.defvjp(_decay_scan_forward, _decay_scan_backward)


class DecayContext(Layer):
    """Exponential decay of a projection, by channel. State: the last context, [B, D]."""

    @nn.compact
    def __call__(self, x_BSD, state, tokens: TokenSpan):
        """Maps the stream to (context, new state)."""
        u_BSD = _projection(self, self.norm("norm", x_BSD))
        dtype = at_least_float32(u_BSD)
        logit_D = self.declare(
            "decay_logit", _decay_logit_init(self.config), u_BSD.shape[-1:], ("channels",), dtype
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


def _decay_logit_init(config: ModelConfig):
    """Time constants `tau = -1 / ln(lam)`, spread geometrically from 1 to `max_seq_len` tokens."""

    def initializer(key, shape, dtype):
        del key
        tau = jnp.geomspace(1.0, config.max_seq_len, shape[0])
        return -jnp.log(jnp.expm1(1 / tau)).astype(dtype)  # logit(exp(-1 / tau))

    return initializer


def _projection(layer: Layer, n_BSD) -> jax.Array:
    """`u = n Wc + bc`, which mean and decay share."""
    D = layer.config.d_model
    kernel = layer.declare("kernel", init.normal(D**-0.5), (D, D), ("embed", "channels"))
    return n_BSD @ kernel + layer.declare("bias", init.zeros, (D,), ("channels",))


# --- attention


class AttentionContext(Layer):
    """Causal attention without biases. State: the key-value cache, [B, N, G, K] each."""

    @nn.compact
    def __call__(self, x_BSD, state, tokens: TokenSpan):
        """Maps the stream to (context, new state)."""
        c = self.config
        D, H, G, K = c.d_model, c.num_heads, c.num_kv_heads, c.head_dim
        n_BSD = self.norm("norm", x_BSD)
        fan_in = init.normal(D**-0.5)
        query = self.declare("query_kernel", fan_in, (D, H, K), ("embed", "heads", None))
        key = self.declare("key_kernel", fan_in, (D, G, K), ("embed", "kv_heads", None))
        value = self.declare("value_kernel", fan_in, (D, G, K), ("embed", "kv_heads", None))
        scaled = init.normal((2 * c.num_layers * H * K) ** -0.5)
        output = self.declare("output_kernel", scaled, (H, K, D), ("heads", None, "embed"))
        dtype = at_least_float32(n_BSD)
        q_scale = self.declare("query_scale", init.ones, (K,), (None,), dtype)
        k_scale = self.declare("key_scale", init.ones, (K,), (None,), dtype)
        q = rms_norm(jnp.einsum("bsd,dhk->bshk", n_BSD, query), q_scale)
        k = rms_norm(jnp.einsum("bsd,dgk->bsgk", n_BSD, key), k_scale)
        q, k = rotate(q, tokens.position_BS), rotate(k, tokens.position_BS)
        v = jnp.einsum("bsd,dgk->bsgk", n_BSD, value)
        if state is None:
            out_BSHK = attend(q, k, v, kernel=attention_kernel(c))
        else:
            # Padding is written too; the row's later tokens overwrite it before it is seen.
            at = (jnp.arange(x_BSD.shape[0])[:, None], tokens.position_BS)
            new = {"key": k, "value": v}
            state = {
                n: cache.at[at].set(new[n].astype(cache.dtype), mode="drop")
                for n, cache in state.items()
            }
            out_BSHK = attend(q, state["key"], state["value"], position_BS=tokens.position_BS)
        return jnp.einsum("bshk,hkd->bsd", out_BSHK, output), state

    @staticmethod
    def state_shapes(config: ModelConfig, batch_size: int, max_len: int):
        """Shapes and types of the cache, with room for `max_len` tokens."""
        c = config
        entries = (batch_size, max_len, c.num_kv_heads, c.head_dim)
        cache = jax.ShapeDtypeStruct(entries, compute_dtype(c))
        return {"key": cache, "value": cache}


MIXERS = {"mean": MeanContext, "decay": DecayContext, "attention": AttentionContext}
