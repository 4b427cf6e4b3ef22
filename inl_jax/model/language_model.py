"""INL-LLM: context mixers, the block, and the language model, for training and for decoding.

One code path serves both. A block takes a chunk of tokens and, when decoding, the state that the
earlier tokens left; training is the chunk that starts at position 0 and keeps no state.

Shapes: B batch, S tokens of this chunk, D width, F feed-forward width, H query heads, G key-value
heads, K head width, N longest sequence a key-value cache holds, L layers, V vocabulary.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from inl_jax.config import InputError, ModelConfig
from inl_jax.model.integrator import TRAJECTORY, Integrator
from inl_jax.model.params import declare, gathered

init = nn.initializers


class Chunk(NamedTuple):
    """What a block must know of the tokens it is given."""

    position_BS: jax.Array  # of every token in its sequence, int32
    length_B: jax.Array | None  # tokens that are real; the rest is padding on the right


class DecodeState(NamedTuple):
    """What decoding keeps of the tokens so far. O(1) in their number for mean and decay."""

    position_B: jax.Array
    layers: dict[str, jax.Array]  # every leaf [L, B, ...]


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """The type of matrix products: as configured, or by parameter type and device."""
    if config.param_dtype == "float64":
        if not jax.config.jax_enable_x64:
            raise InputError("model.param_dtype=float64 needs jax.config.jax_enable_x64 = True")
        return jnp.dtype("float64")
    if config.compute_dtype != "auto":
        return jnp.dtype(config.compute_dtype)
    return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")


def cuda_capability() -> tuple[int, ...] | None:
    """The compute capability of the CUDA devices that JAX runs on; None where it runs on others."""
    device = jax.local_devices()[0]
    if "cuda" not in device.client.platform_version:
        return None
    return tuple(map(int, device.compute_capability.split(".")))


def attention_kernel(config: ModelConfig) -> str:
    """What computes attention over whole sequences, cudnn or xla: as configured, or by device.

    Raises:
      InputError: cuDNN cannot, on this device, in this type or at this head width.
    """
    capability = cuda_capability()
    if config.attention_kernel == "xla" or (config.attention_kernel == "auto" and not capability):
        return "xla"
    if not capability:
        raise InputError(
            f"model.attention_kernel=cudnn: JAX runs on {jax.default_backend()} here, without "
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


def _state_dtype(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(jnp.float32, x.dtype)


# --- the mathematics, as functions of arrays


@jax.checkpoint  # keeps x, not the steps to its norm
def layer_norm(x_D, scale_D, bias_D) -> jax.Array:
    """Layer normalisation over the last axis, eps 1e-5, computed in float32."""
    x = x_D.astype(_state_dtype(x_D))
    x = x - x.mean(axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)
    return (x * scale_D + bias_D).astype(x_D.dtype)


def rms_norm(x_K, scale_K) -> jax.Array:
    """RMS normalisation over the last axis, eps 1e-6, computed in float32."""
    x = x_K.astype(_state_dtype(x_K))
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    return (x * scale_K).astype(x_K.dtype)


def sinusoid(position_BS, d_model: int, dtype) -> jax.Array:
    """Sinusoidal positions, [B, S, D]: sin on even, cos on odd columns, base 10000."""
    frequency = jnp.exp(jnp.arange(0, d_model, 2, dtype=dtype) * (-math.log(10000.0) / d_model))
    angle = position_BS[..., None].astype(dtype) * frequency
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(*position_BS.shape, d_model)


def rotate(x_BSHK, position_BS) -> jax.Array:
    """Rotary positions, base 10000, pairing column i with column i + K/2 (Su et al., 2021)."""
    half = x_BSHK.shape[-1] // 2
    dtype = _state_dtype(x_BSHK)
    frequency = jnp.exp(jnp.arange(half, dtype=dtype) * (-math.log(10000.0) / half))
    angle = position_BS[..., None, None].astype(dtype) * frequency
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    a, b = jnp.split(x_BSHK.astype(dtype), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BSHK.dtype)


def running_mean(u_BSD, sum_BD, chunk: Chunk) -> tuple[jax.Array, jax.Array]:
    """`h_i = mean(u_0 .. u_i)` in float32, given the sum over earlier chunks; and the new sum."""
    total_BSD = jnp.cumsum(u_BSD.astype(sum_BD.dtype), axis=1) + sum_BD[:, None]
    mean_BSD = total_BSD / (chunk.position_BS[..., None] + 1).astype(total_BSD.dtype)
    return mean_BSD.astype(u_BSD.dtype), _last_real(total_BSD, chunk)


@jax.custom_vjp
def decay_scan(u_BSD, decay_D, h0_BD) -> jax.Array:
    """`h_i = decay h_(i-1) + (1 - decay) u_i` from `h_(-1) = h0`, in parallel over S: [B, S, D].

    Carried in the type of its arguments, which must be one.
    """
    drive = ((1 - decay_D) * u_BSD).at[:, 0].add(decay_D * h0_BD)
    return _linear_scan(decay_D, drive)


def _linear_scan(decay_D, drive_BSD, *, reverse: bool = False):
    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    decay_BSD = jnp.broadcast_to(decay_D, drive_BSD.shape)
    return jax.lax.associative_scan(combine, (decay_BSD, drive_BSD), reverse=reverse, axis=1)[1]


def _decay_scan_forward(u_BSD, decay_D, h0_BD):
    h_BSD = decay_scan(u_BSD, decay_D, h0_BD)
    return h_BSD, (u_BSD, decay_D, h0_BD, h_BSD)


def _decay_scan_backward(residuals, dh_BSD):
    # The adjoint is the same recurrence run backwards: g_i = dh_i + decay g_(i+1).
    # Autodiff of the associative scan gives the same numbers in more time and memory (docs/LOG.md).
    u_BSD, decay_D, h0_BD, h_BSD = residuals
    g_BSD = _linear_scan(decay_D, dh_BSD, reverse=True)
    earlier_BSD = jnp.concatenate([h0_BD[:, None], h_BSD[:, :-1]], axis=1)
    d_decay_D = jnp.sum(g_BSD * (earlier_BSD - u_BSD), axis=(0, 1))
    return (1 - decay_D) * g_BSD, d_decay_D, decay_D * g_BSD[:, 0]


decay_scan.defvjp(_decay_scan_forward, _decay_scan_backward)


def attend(q_BSHK, k_BNGK, v_BNGK, *, position_BS=None, kernel: str = "xla") -> jax.Array:
    """Causal softmax attention over grouped key-value heads, [B, S, H, K].

    Without `position_BS` queries and keys are the same tokens, and `kernel` (from
    `attention_kernel`) is asked for by name, so that it raises where it is missing. With it, keys
    are a cache, token i of row b sees the entries up to `position_BS[b, i]`, and XLA computes.
    """
    if position_BS is None:
        return jax.nn.dot_product_attention(
            q_BSHK, k_BNGK, v_BNGK, is_causal=True, implementation=kernel
        )
    seen_B1SN = jnp.arange(k_BNGK.shape[1]) <= position_BS[:, None, :, None]
    return jax.nn.dot_product_attention(
        q_BSHK, k_BNGK, v_BNGK, mask=seen_B1SN, implementation="xla"
    )


def feed_forward(x_BSD, up_kernel, up_bias, down_kernel, down_bias) -> jax.Array:
    """`W2 gelu(W1 x + b1) + b2` with the exact (erf) GELU."""
    return jax.nn.gelu(x_BSD @ up_kernel + up_bias, approximate=False) @ down_kernel + down_bias


def whole(x_BSD) -> jax.Array:
    """The stream on every device of the tensor axis, between the parts that split it there."""
    return nn.with_logical_constraint(x_BSD, ("batch", "sequence", "activation"))


def look_up(embedding_VD, ids_BS) -> jax.Array:
    """Rows of the embedding, [B, S, D], each device looking in the columns that it keeps.

    The ids and what was found are exchanged, which is less than the table and its gradient.
    """
    ids_BS = nn.with_logical_constraint(ids_BS, ("replicas", "sequence"))
    x_BSD = embedding_VD[ids_BS]
    for width in ("table", "embed"):  # first over the tensor axis, then over fsdp
        x_BSD = nn.with_logical_constraint(x_BSD, ("replicas", "sequence", width))
    return whole(x_BSD)


def embedding_rows(embedding_VD) -> jax.Array:
    """The embedding for `project`: whole rows, which the tensor axis shares out by vocabulary.

    It is kept split by width alone, because vocabularies have few divisors (50257 = 29 * 1733) and
    what is kept must divide.
    """
    return gathered(
        nn.with_logical_constraint(embedding_VD, ("vocab", "embed")), ("vocab", "embed")
    )


def _last_real(h_BSD, chunk: Chunk) -> jax.Array:
    """The vector at the last token of each row that is not padding, [B, D]."""
    if chunk.length_B is None:
        return h_BSD[:, -1]
    return jnp.take_along_axis(h_BSD, (chunk.length_B - 1)[:, None, None], axis=1)[:, 0]


# --- modules: they declare parameters and logical axes


class _Declares(nn.Module):
    config: ModelConfig

    def declare(self, name, initializer, shape, axes, dtype=None) -> jax.Array:
        """A parameter with logical axis names, cast to `dtype` (the compute type by default)."""
        c = self.config
        return declare(
            self,
            name,
            initializer,
            shape,
            axes,
            param_dtype=c.param_dtype,
            dtype=dtype or compute_dtype(c),
        )

    def norm(self, name: str, x_BSD):
        """Layer normalisation with parameters `<name>_scale` and `<name>_bias`."""
        shape = (x_BSD.shape[-1],)
        dtype = _state_dtype(x_BSD)
        scale = self.declare(f"{name}_scale", init.ones, shape, ("norm",), dtype)
        bias = self.declare(f"{name}_bias", init.zeros, shape, ("norm",), dtype)
        return whole(layer_norm(x_BSD, scale, bias))


class MeanContext(_Declares):
    """Running mean of a projection: the published block. State: the sum so far, [B, D]."""

    @nn.compact
    def __call__(self, n_BSD, state, chunk: Chunk):
        """Maps the normalised stream to (context, new state)."""
        u_BSD = _context_projection(self, n_BSD)
        if state is None:
            zero_BD = jnp.zeros_like(u_BSD[:, 0], _state_dtype(u_BSD))
            return running_mean(u_BSD, zero_BD, chunk)[0], None
        h_BSD, total_BD = running_mean(u_BSD, state["sum"], chunk)
        return h_BSD, {"sum": total_BD}


class DecayContext(_Declares):
    """Per-channel exponential decay of a projection. State: the last context, [B, D] float32."""

    @nn.compact
    def __call__(self, x_BSD, state, chunk: Chunk):
        """Maps the stream to (context, new state)."""
        D = self.config.d_model
        u_BSD = _context_projection(self, self.norm("norm", x_BSD))
        dtype = _state_dtype(u_BSD)
        decay_D = jax.nn.sigmoid(
            self.declare("decay_logit", _decay_logit_init(self.config), (D,), ("channels",), dtype)
        )
        h0_BD = jnp.zeros_like(u_BSD[:, 0], dtype) if state is None else state["h"]
        h_BSD = decay_scan(u_BSD.astype(dtype), decay_D, h0_BD)
        new_state = None if state is None else {"h": _last_real(h_BSD, chunk)}
        return h_BSD.astype(u_BSD.dtype), new_state


class AttentionContext(_Declares):
    """Grouped-query attention, rotary positions, normalised queries and keys. State: the cache."""

    @nn.compact
    def __call__(self, x_BSD, state, chunk: Chunk):
        """Maps the stream to (context, new state)."""
        c = self.config
        D, H, G, K = c.d_model, c.num_heads, c.num_kv_heads, c.head_dim
        n_BSD = self.norm("norm", x_BSD)
        fan_in = init.normal(D**-0.5)
        query = self.declare("query_kernel", fan_in, (D, H, K), ("embed", "heads", None))
        key = self.declare("key_kernel", fan_in, (D, G, K), ("embed", "kv_heads", None))
        value = self.declare("value_kernel", fan_in, (D, G, K), ("embed", "kv_heads", None))
        output = self.declare(
            "output_kernel",
            init.normal((2 * c.num_layers * H * K) ** -0.5),
            (H, K, D),
            ("heads", None, "embed"),
        )
        dtype = _state_dtype(n_BSD)
        q_scale = self.declare("query_scale", init.ones, (K,), (None,), dtype)
        k_scale = self.declare("key_scale", init.ones, (K,), (None,), dtype)
        q = rms_norm(jnp.einsum("bsd,dhk->bshk", n_BSD, query), q_scale)
        k = rms_norm(jnp.einsum("bsd,dgk->bsgk", n_BSD, key), k_scale)
        q, k = rotate(q, chunk.position_BS), rotate(k, chunk.position_BS)
        v = jnp.einsum("bsd,dgk->bsgk", n_BSD, value)
        if state is None:
            out_BSHK, new_state = attend(q, k, v, kernel=attention_kernel(c)), None
        else:
            # Padding is written too; the row's later tokens overwrite it before it is seen.
            at = (jnp.arange(x_BSD.shape[0])[:, None], chunk.position_BS)
            cache = {"key": k.astype(state["key"].dtype), "value": v.astype(state["value"].dtype)}
            new_state = {n: state[n].at[at].set(new, mode="drop") for n, new in cache.items()}
            out_BSHK = attend(
                q, new_state["key"], new_state["value"], position_BS=chunk.position_BS
            )
        return jnp.einsum("bshk,hkd->bsd", out_BSHK, output), new_state


def _context_projection(module: _Declares, n_BSD) -> jax.Array:
    D = module.config.d_model
    kernel = module.declare("kernel", init.normal(D**-0.5), (D, D), ("embed", "channels"))
    return n_BSD @ kernel + module.declare("bias", init.zeros, (D,), ("channels",))


def _decay_logit_init(config: ModelConfig):
    """Time constants `-1 / ln(decay)` spread geometrically from 1 to the longest sequence."""

    def initializer(key, shape, dtype):
        del key
        tau = jnp.geomspace(1.0, config.max_seq_len, shape[0])
        return -jnp.log(jnp.expm1(1 / tau)).astype(dtype)  # logit(exp(-1 / tau))

    return initializer


CONTEXTS = {"mean": MeanContext, "decay": DecayContext, "attention": AttentionContext}


class Block(_Declares):
    """Context mixer, integrator, feed-forward: x, state -> x, new state."""

    deterministic: bool = True

    @nn.compact
    def __call__(self, x_BSD, state, chunk: Chunk, amplitude):
        """Refines the stream; see the equations in the README."""
        c = self.config
        D, F = c.d_model, c.d_ff
        x_BSD = whole(x_BSD)
        mixer = CONTEXTS[c.context](c, name="context")
        if c.context == "mean":
            n_BSD = self.norm("norm1", x_BSD)
            h_BSD, state = mixer(n_BSD, state, chunk)
            # The published residual: the refined state is added, its start is not taken off.
            x_BSD = whole(x_BSD + self.dropout(self.integrator(h_BSD, n_BSD, amplitude)))
        else:
            h_BSD, state = mixer(x_BSD, state, chunk)
            x_BSD = whole(x_BSD + h_BSD)
            if c.num_iterations > 0:
                n_BSD = self.norm("norm1", x_BSD)
                moved_BSD = self.integrator(h_BSD, n_BSD, amplitude) - n_BSD
                x_BSD = whole(x_BSD + self.dropout(moved_BSD))
        n_BSD = self.norm("norm2", x_BSD)
        out_BSD = feed_forward(
            n_BSD,
            self.declare("up_kernel", init.normal(D**-0.5), (D, F), ("embed", "mlp")),
            self.declare("up_bias", init.zeros, (F,), ("mlp",)),
            self.declare(
                "down_kernel", init.normal((2 * c.num_layers * F) ** -0.5), (F, D), ("mlp", "embed")
            ),
            self.declare("down_bias", init.zeros, (D,), ("norm",)),
        )
        return x_BSD + self.dropout(out_BSD), state

    def integrator(self, h_BSD, n_BSD, amplitude) -> jax.Array:
        """The last integrator state, started from `n` with context `h`."""
        layer = Integrator(self.config, name="integrator")
        x_BSD = layer(h_BSD, n_BSD, amplitude=amplitude, dtype=compute_dtype(self.config))
        return x_BSD.astype(n_BSD.dtype)

    def dropout(self, x_BSD) -> jax.Array:
        """Dropout at the configured rate, off when deterministic."""
        return nn.Dropout(self.config.dropout, deterministic=self.deterministic)(x_BSD)


class INLModel(_Declares):
    """Token ids and the state of earlier ones to final hidden vectors and the new state."""

    deterministic: bool = True

    @nn.compact
    def __call__(self, ids_BS, state: DecodeState | None, length_B, amplitude):
        """Returns (hidden [B, S, D] in the compute type, new state)."""
        c = self.config
        dtype = compute_dtype(c)
        # Looked up in float32, so that the embedding's gradient adds up in float32.
        table_dtype = jnp.promote_types(jnp.float32, dtype)
        embedding_VD = self.declare(
            "embedding",
            init.normal(c.d_model**-0.5),
            (c.vocab_size, c.d_model),
            (None, "table"),
            table_dtype,
        )
        start_B1 = 0 if state is None else state.position_B[:, None]
        position_BS = jnp.broadcast_to(start_B1 + jnp.arange(ids_BS.shape[1]), ids_BS.shape)
        x_BSD = math.sqrt(c.d_model) * look_up(embedding_VD, ids_BS)
        if c.context != "attention":
            x_BSD = x_BSD + sinusoid(position_BS, c.d_model, table_dtype)
        x_BSD = nn.Dropout(c.dropout, deterministic=self.deterministic)(x_BSD).astype(dtype)

        block = Block
        if c.remat in ("block", "all_but_integrator"):
            keep = (TRAJECTORY,) if c.remat == "all_but_integrator" else ()
            policy = jax.checkpoint_policies.save_only_these_names(*keep)
            block = nn.remat(Block, prevent_cse=False, policy=policy)
        blocks = nn.scan(
            block,
            length=c.num_layers,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.deterministic, name="blocks")
        x_BSD, layers = blocks(
            x_BSD, None if state is None else state.layers, Chunk(position_BS, length_B), amplitude
        )
        hidden_BSD = self.norm("final_norm", x_BSD)
        if state is None:
            return hidden_BSD, None
        advance_B = ids_BS.shape[1] if length_B is None else length_B
        return hidden_BSD, DecodeState(state.position_B + advance_B, layers)


# --- the model as functions of (config, params, ...)


def boxed_init(config: ModelConfig, key: jax.Array) -> Any:
    """Fresh parameters in their boxes of logical axis names; for `jax.eval_shape` and `unbox`."""
    ids = jnp.zeros((1, 1), jnp.int32)
    state = init_decode_state(config, 1, 1)  # decoding does not depend on `attention_kernel`
    return INLModel(config).init(key, ids, state, None, 0.0)["params"]


@functools.partial(jax.jit, static_argnums=0)
def init_params(config: ModelConfig, key: jax.Array) -> Any:
    """Fresh parameters, a plain dict of arrays. Layers are stacked on the first axis of `blocks`.

    Args:
      config: the architecture.
      key: a `jax.random.key`.
    """
    return unbox(boxed_init(config, key))


def unbox(boxed: Any) -> Any:
    """Parameters without their axis names. (`nn.unbox` would also constrain their sharding.)"""
    return jax.tree.map(
        lambda box: box.value, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    )


@functools.lru_cache(maxsize=64)
def boxed_shapes(config: ModelConfig) -> Any:
    """The shapes and types of `boxed_init`, without allocating. Not to be changed: it is kept."""
    return jax.eval_shape(functools.partial(boxed_init, config), jax.random.key(0))


def abstract_params(config: ModelConfig) -> Any:
    """The shapes and types of `init_params`, without allocating."""
    return unbox(boxed_shapes(config))


def param_count(config: ModelConfig) -> int:
    """The number of parameters, from shapes alone."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))


def hidden_states(config: ModelConfig, params, input_ids, *, amplitude=None, dropout_key=None):
    """Final hidden vectors, [B, S, D] in the compute type, normalised and ready for `logits`.

    Args:
      config: the architecture.
      params: as returned by `init_params`.
      input_ids: [B, S] integers within the vocabulary (unchecked here: out-of-range ids are
        silently clamped, so check them on the host).
      amplitude: excitation amplitude, a number or traced scalar; the config's by default.
      dropout_key: turns dropout on.
    """
    amplitude = config.excitation_amplitude if amplitude is None else amplitude
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    model = INLModel(config, deterministic=dropout_key is None)
    return model.apply({"params": params}, input_ids, None, None, amplitude, rngs=rngs)[0]


def logits(params, hidden_D) -> jax.Array:
    """`hidden E^T` with the tied embedding: float32 (float64 for float64 hidden), [..., V]."""
    return project(embedding_rows(params["embedding"]), hidden_D)


def project(embedding_VD, hidden_D) -> jax.Array:
    """`logits` from `embedding_rows`, for loops: what is gathered within one is so every time."""
    return jnp.einsum(
        "...d,vd->...v",
        hidden_D,
        embedding_VD.astype(hidden_D.dtype),
        preferred_element_type=_state_dtype(hidden_D),
    )


def apply(config: ModelConfig, params, input_ids, *, amplitude=None, dropout_key=None) -> jax.Array:
    """Next-token logits, float32 [B, S, V] (float64 for float64 parameters).

    Takes what `hidden_states` takes.
    """
    hidden = hidden_states(config, params, input_ids, amplitude=amplitude, dropout_key=dropout_key)
    return logits(params, hidden)


def init_decode_state(config: ModelConfig, batch_size: int, max_len: int) -> DecodeState:
    """The state before the first token, for sequences of up to `max_len` tokens."""
    c = config
    dtype = compute_dtype(c)
    wide = jnp.promote_types(jnp.float32, dtype)
    if c.context == "attention":
        shape = (c.num_layers, batch_size, max_len, c.num_kv_heads, c.head_dim)
        layers = {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)}
    else:
        name = {"mean": "sum", "decay": "h"}[c.context]
        layers = {name: jnp.zeros((c.num_layers, batch_size, c.d_model), wide)}
    return DecodeState(jnp.zeros(batch_size, jnp.int32), layers)


def decode(config: ModelConfig, params, state: DecodeState, ids_BS, length_B=None):
    """Feeds a chunk of tokens to a decoding state.

    Args:
      config: the architecture.
      params: as returned by `init_params`.
      state: from `init_decode_state` or an earlier call.
      ids_BS: the next tokens of every row, padded on the right.
      length_B: how many of them are real (at least 1); all by default.

    Returns:
      Logits after the last real token of each row, [B, V], and the new state.
    """
    hidden_BSD, state = INLModel(config).apply(
        {"params": params}, ids_BS, state, length_B, config.excitation_amplitude
    )
    return logits(params, _last_real(hidden_BSD, Chunk(None, length_B))), state
