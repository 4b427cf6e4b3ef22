"""Causal attention: grouped queries, rotary positions, normalised queries and keys.

Shapes: B batch, S tokens given, D width, H query heads, G key-value heads, K head width, N entries
of the key-value cache.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from inl_jax.config import InputError, ModelConfig
from inl_jax.model.layers import Layer, at_least_float32, compute_dtype, kept, rms_norm
from inl_jax.model.mixers.blocked_attention import blocked_attention
from inl_jax.model.mixers.kv_cache import attend_with_cache
from inl_jax.model.mixers.span import TokenSpan
from inl_jax.model.platform.device import current_device

init = nn.initializers


class AttentionContext(Layer):
    """Causal attention without biases. State: the key-value cache, [B, G, N, K] each."""

    @nn.compact
    def __call__(self, x_BSD, state, tokens: TokenSpan):
        """Maps the stream to (context, new entries of the cache, for `write_entries`)."""
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
        q = rms_norm(kept(jnp.einsum("bsd,dhk->bshk", n_BSD, query)), q_scale)
        k = rms_norm(kept(jnp.einsum("bsd,dgk->bsgk", n_BSD, key)), k_scale)
        q, k = rotate(q, tokens.position_BS), rotate(k, tokens.position_BS)
        v = kept(jnp.einsum("bsd,dgk->bsgk", n_BSD, value))
        if state is None:
            out_BSHK, new_BGSK = attend(q, k, v, kernel=attention_kernel(c)), None
        else:
            new_BGSK = {"key": k.swapaxes(1, 2), "value": v.swapaxes(1, 2)}
            out_BSHK = attend_with_cache(q, new_BGSK, state, tokens)
        return kept(jnp.einsum("bshk,hkd->bsd", out_BSHK, output)), new_BGSK

    @staticmethod
    def state_shapes(config: ModelConfig, batch_size: int, max_len: int):
        """Shapes and types of the cache, with room for `max_len` tokens."""
        c = config
        entries = (batch_size, c.num_kv_heads, max_len, c.head_dim)
        cache = jax.ShapeDtypeStruct(entries, compute_dtype(c))
        return {"key": cache, "value": cache}


def rotate(x_BSHK, position_BS) -> jax.Array:
    """Rotary positions, base 10000, pairing column i with column i + K/2 (Su et al., 2021)."""
    half = x_BSHK.shape[-1] // 2
    dtype = at_least_float32(x_BSHK)
    frequency = jnp.exp(jnp.arange(half, dtype=dtype) * (-math.log(10000.0) / half))
    angle = position_BS[..., None, None].astype(dtype) * frequency
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    a, b = jnp.split(x_BSHK.astype(dtype), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BSHK.dtype)


def attention_kernel(config: ModelConfig) -> str:
    """The kernel for attention over whole sequences: "cudnn" or "xla".

    Raises:
      InputError: cuDNN is wanted, but not available on this device, in this type or at this head
        width.
    """
    capability = current_device().capability
    if config.attention_kernel == "xla" or (config.attention_kernel == "auto" and not capability):
        return "xla"
    if not capability:
        raise InputError(
            f"model.attention_kernel=cudnn: JAX runs on {current_device().platform} here, without "
            "CUDA; use auto or xla, or install inl_jax[cuda]"
        )
    dtype, widest = compute_dtype(config), 256 if capability >= (9, 0) else 128
    if dtype != jnp.bfloat16:
        raise InputError(
            f"model.compute_dtype={dtype}: cuDNN attention takes bfloat16; set "
            "model.compute_dtype=bfloat16 or model.attention_kernel=xla"
        )
    if config.head_dim % 8 != 0 or config.head_dim > widest:
        raise InputError(
            f"model.num_heads={config.num_heads} makes heads of width {config.head_dim}: cuDNN "
            f"attention takes multiples of 8 up to {widest} on this GPU; change model.num_heads "
            "or set model.attention_kernel=xla"
        )
    return "cudnn"


def attend(q_BSHK, k_BSGK, v_BSGK, *, kernel: str = "xla") -> jax.Array:
    """Causal softmax attention over grouped key-value heads, [B, S, H, K].

    JAX is asked for `kernel` (from `attention_kernel`) by name, so that it raises if the kernel is
    missing.
    """
    if kernel == "xla":
        B, S, H, K = q_BSHK.shape
        grouped = q_BSHK.reshape(B, S, k_BSGK.shape[2], -1, K)
        by_head = (jnp.moveaxis(a, 1, -2) for a in (grouped, k_BSGK, v_BSGK))
        out_BGRSK = blocked_attention(*by_head)
        return jnp.moveaxis(out_BGRSK, -2, 1).reshape(B, S, H, K)
    return jax.nn.dot_product_attention(
        q_BSHK, k_BSGK, v_BSGK, is_causal=True, implementation=kernel
    )
