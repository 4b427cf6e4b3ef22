"""What blocks are built from: types, norms, positions, feed-forward, embedding.

Shapes: B batch, S tokens, D width, F feed-forward width, K head width, V vocabulary.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from inl_jax.config import InputError, ModelConfig
from inl_jax.model.params import declare, gathered
from inl_jax.model.platform.device import current_device

# --- types


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """The type of matrix products: the configured one, or the default of parameters and device.

    Raises:
      InputError: float64 parameters, and JAX does not have 64-bit types enabled.
    """
    if config.param_dtype == "float64":
        if not jax.config.jax_enable_x64:
            raise InputError(
                "model.param_dtype=float64: JAX's 64-bit types are off; set "
                "JAX_ENABLE_X64=1 in the environment"
            )
        return jnp.dtype("float64")
    if config.compute_dtype != "auto":
        return jnp.dtype(config.compute_dtype)
    return jnp.dtype("float32" if current_device().platform == "cpu" else "bfloat16")


def at_least_float32(x_or_dtype) -> jnp.dtype:
    """The type for norms, sums and states: float32, or float64 if the array or type given is."""
    return jnp.promote_types(jnp.float32, getattr(x_or_dtype, "dtype", x_or_dtype))


# --- what a block keeps for its gradient

PRODUCT = "product"  # the name by which a remat policy can save the results of products


def kept(tree):
    """The arrays under the name `PRODUCT`: from these the rest of a block takes no product."""
    return checkpoint_name(tree, PRODUCT)


# --- norms


@jax.checkpoint  # the backward pass keeps x alone, and recomputes the steps to its norm
def layer_norm(x_D, scale_D, bias_D) -> jax.Array:
    """Layer normalisation over the last axis, eps 1e-5, computed in float32."""
    x = x_D.astype(at_least_float32(x_D))
    x = x - x.mean(axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)
    return (x * scale_D + bias_D).astype(x_D.dtype)


def rms_norm(x_K, scale_K) -> jax.Array:
    """RMS normalisation over the last axis, eps 1e-6, computed in float32."""
    x = x_K.astype(at_least_float32(x_K))
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    return (x * scale_K).astype(x_K.dtype)


# --- positions


def sinusoid(position_BS, d_model: int, dtype) -> jax.Array:
    """Sinusoidal positions, [B, S, D]: sin on even, cos on odd columns, base 10000."""
    frequency = jnp.exp(jnp.arange(0, d_model, 2, dtype=dtype) * (-math.log(10000.0) / d_model))
    angle = position_BS[..., None].astype(dtype) * frequency
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(*position_BS.shape, d_model)


# --- feed-forward


@jax.custom_vjp
def feed_forward(x_BSD, up_kernel_DF, up_bias_F, down_kernel_FD, down_bias_D) -> jax.Array:
    """`W2 gelu(z) + b2` with `z = W1 x + b1` and the exact GELU, `gelu(z) = z Phi(z)`.

    Phi is the normal distribution's cumulative distribution function.
    """
    return _feed_forward(x_BSD, up_kernel_DF, up_bias_F, down_kernel_FD, down_bias_D)[0]


def _feed_forward(x_BSD, up_kernel_DF, up_bias_F, down_kernel_FD, down_bias_D):
    z_BSF = kept(x_BSD @ up_kernel_DF + up_bias_F)
    gelu_BSF, _ = _gelu_and_slope(z_BSF)
    y_BSD = gelu_BSF.astype(z_BSF.dtype) @ down_kernel_FD + down_bias_D
    return y_BSD, (x_BSD, z_BSF, up_kernel_DF, down_kernel_FD)


def _feed_forward_backward(residuals, dy_BSD):
    # Automatic differentiation keeps gelu(z) and factors of its slope beside z. From z alone, both
    # are made in one pass over memory that computes Phi once.
    x_BSD, z_BSF, up_kernel_DF, down_kernel_FD = residuals
    gelu_BSF, slope_BSF = _gelu_and_slope(z_BSF)
    dz_wide_BSF = (dy_BSD @ down_kernel_FD.T) * slope_BSF
    dz_BSF = dz_wide_BSF.astype(z_BSF.dtype)
    return (
        dz_BSF @ up_kernel_DF.T,
        jnp.einsum("bsd,bsf->df", x_BSD, dz_BSF),
        dz_wide_BSF.sum(axis=(0, 1)).astype(z_BSF.dtype),
        # So that a CPU transposes dy for the product, which is narrower than gelu(z).
        jnp.einsum("bsd,bsf->df", dy_BSD, gelu_BSF.astype(z_BSF.dtype)).T,
        dy_BSD.astype(slope_BSF.dtype).sum(axis=(0, 1)).astype(dy_BSD.dtype),
    )


feed_forward.defvjp(_feed_forward, _feed_forward_backward)


def _gelu_and_slope(z_BSF) -> tuple[jax.Array, jax.Array]:
    """`z Phi(z)` and its derivative `Phi(z) + z phi(z)`, at least float32."""
    z_BSF = z_BSF.astype(at_least_float32(z_BSF))
    below_BSF = 0.5 + 0.5 * jax.lax.erf(z_BSF * math.sqrt(0.5))
    density_BSF = jnp.exp(-0.5 * z_BSF * z_BSF) / math.sqrt(2 * math.pi)
    gelu_BSF = z_BSF * below_BSF
    if current_device().platform == "cpu":
        # XLA would write Phi to memory for both, and make the slope over it in place, in scalar
        # code. As erf(-z) = -erf(z) it does not find that this is the same.
        below_BSF = 0.5 - 0.5 * jax.lax.erf(z_BSF * -math.sqrt(0.5))
    return gelu_BSF, below_BSF + z_BSF * density_BSF


# --- embedding


def whole(x_BSD) -> jax.Array:
    """Constrains the stream to be whole along D: norms and products read all of it."""
    return nn.with_logical_constraint(x_BSD, ("batch", "sequence", "activation"))


def look_up(embedding_VD, ids_BS) -> jax.Array:
    """Rows of the embedding, [B, S, D]. Each device looks up the columns that it stores.

    Devices exchange ids and the vectors found, which is less than the table and its gradient.
    """
    ids_BS = nn.with_logical_constraint(ids_BS, ("replicas", "sequence"))
    x_BSD = embedding_VD[ids_BS]
    for width in ("table", "embed"):  # first over the tensor axis, then over fsdp
        x_BSD = nn.with_logical_constraint(x_BSD, ("replicas", "sequence", width))
    return whole(x_BSD)


def embedding_rows(embedding_VD) -> jax.Array:
    """The embedding for `project`: whole rows, sharded over the tensor axis by vocabulary.

    It is stored sharded by width alone: a stored axis must divide evenly, and vocabularies have few
    divisors (50257 = 29 * 1733).
    """
    return gathered(
        nn.with_logical_constraint(embedding_VD, ("vocab", "embed")), ("vocab", "embed")
    )


def project(embedding_VD, hidden_D) -> jax.Array:
    """`hidden E^T` from `embedding_rows`: float32 (float64 for float64 hidden), [..., V].

    A loop calls `embedding_rows` once, before it starts: inside, devices would gather every time.
    """
    return jnp.einsum(
        "...d,vd->...v",
        hidden_D,
        embedding_VD.astype(hidden_D.dtype),
        preferred_element_type=at_least_float32(hidden_D),
    )


# --- the base of the modules


class Layer(nn.Module):
    """Declares parameters as the config says: stored in its type, used in the compute type."""

    config: ModelConfig

    def declare(self, name, initializer, shape, axes, dtype=None) -> jax.Array:
        """A parameter with a logical name for each axis, in `dtype` (the compute type)."""
        return declare(
            self,
            name,
            initializer,
            shape,
            axes,
            param_dtype=self.config.param_dtype,
            dtype=dtype or compute_dtype(self.config),
        )

    def norm(self, name: str, x_BSD) -> jax.Array:
        """`layer_norm` with the parameters `<name>_scale` and `<name>_bias`."""
        shape, dtype = (x_BSD.shape[-1],), at_least_float32(x_BSD)
        scale_D = self.declare(f"{name}_scale", nn.initializers.ones, shape, ("vector",), dtype)
        bias_D = self.declare(f"{name}_bias", nn.initializers.zeros, shape, ("vector",), dtype)
        return whole(layer_norm(x_BSD, scale_D, bias_D))
