"""The language model: block, model, and its functions for training and for decoding.

    x = sqrt(D) E[ids] + P[position]         P: sinusoid; for mean and decay without attention
    for each block:
        mean         n = LN1(x);  h = context(n)
        the others   h = context(x);  x = x + h;  n = LN1(x)
        x_T = integrator: T steps from the state n, with context h
        mean         x = x + x_T       as published
        the others   x = x + x_T - n
        x = x + W2 gelu(W1 LN2(x) + b1) + b2
    logits = LN_f(x) E^T

`x` is the residual stream; `x_T` is the last state of the integrator. The contexts are in
`mixers/` (all but mean begin with a norm of their own), the steps in `dynamics.py`.
Dropout acts on the embedding, on what the integrator adds and on what the feed-forward adds.

Training and decoding are one path. A block takes a span of tokens and, when decoding, the state
that the earlier tokens left. Training is the span that starts at position 0 and keeps no state.

Shapes: B batch, S tokens given, D width, F feed-forward width, L layers, V vocabulary.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from inl_jax.config import ModelConfig
from inl_jax.model.dynamics_vjp import TRAJECTORY
from inl_jax.model.integrator import Integrator
from inl_jax.model.layers import (
    PRODUCT,
    Layer,
    at_least_float32,
    compute_dtype,
    embedding_rows,
    feed_forward,
    look_up,
    project,
    sinusoid,
    whole,
)
from inl_jax.model.mixers.attention import AttentionContext
from inl_jax.model.mixers.decay import DecayContext
from inl_jax.model.mixers.gated import GatedContext
from inl_jax.model.mixers.kv_cache import write_entries
from inl_jax.model.mixers.mean import MeanContext
from inl_jax.model.mixers.span import LayerState, TokenSpan, last_real
from inl_jax.model.platform.device import current_device

init = nn.initializers

MIXERS = {
    "mean": MeanContext,
    "decay": DecayContext,
    "gated": GatedContext,
    "attention": AttentionContext,
}


class DecodeState(NamedTuple):
    """What decoding keeps of the tokens so far. Without attention its size does not grow."""

    position_B: jax.Array  # of the next token, int32
    layers: dict[str, Any]  # the mixers' states, every leaf [L, B, ...]; of a `Group` by its layers


class Block(Layer):
    """Context mixer, integrator, feed-forward."""

    mixer: str
    deterministic: bool = True

    @nn.compact
    def __call__(self, x_BSD, state, tokens: TokenSpan, amplitude):
        """Maps the stream and the mixer's state to new ones; see the equations above."""
        c = self.config
        D, F = c.d_model, c.d_ff
        x_BSD, decoding = whole(x_BSD), state is not None
        mixer = MIXERS[self.mixer](c, name="context")
        if self.mixer == "mean":
            n_BSD = self.norm("norm1", x_BSD)
            h_BSD, state = mixer(n_BSD, state, tokens)
            last_BSD = self.integrator(h_BSD, n_BSD, amplitude, decoding)
            x_BSD = whole(x_BSD + self.dropout(last_BSD))
        else:
            h_BSD, state = mixer(x_BSD, state, tokens)
            x_BSD = whole(x_BSD + h_BSD)
            if c.num_iterations > 0:
                n_BSD = self.norm("norm1", x_BSD)
                moved_BSD = self.integrator(h_BSD, n_BSD, amplitude, decoding) - n_BSD
                x_BSD = whole(x_BSD + self.dropout(moved_BSD))
        n_BSD = self.norm("norm2", x_BSD)
        scaled = init.normal((2 * c.num_layers * F) ** -0.5)
        out_BSD = feed_forward(
            n_BSD,
            self.declare("up_kernel", init.normal(D**-0.5), (D, F), ("embed", "mlp")),
            self.declare("up_bias", init.zeros, (F,), ("mlp",)),
            self.declare("down_kernel", scaled, (F, D), ("mlp", "embed")),
            self.declare("down_bias", init.zeros, (D,), ("vector",)),
        )
        return x_BSD + self.dropout(out_BSD), state

    def integrator(self, h_BSD, n_BSD, amplitude, decoding: bool) -> jax.Array:
        """`x_T`, the last state from the initial state `n` with context `h`."""
        layer, dtype = Integrator(self.config, name="integrator"), compute_dtype(self.config)
        last_BSD = layer(h_BSD, n_BSD, amplitude=amplitude, dtype=dtype, decoding=decoding)
        return last_BSD.astype(n_BSD.dtype)

    def dropout(self, x_BSD) -> jax.Array:
        """Dropout at the config's rate, unless `deterministic`."""
        return nn.Dropout(self.config.dropout, deterministic=self.deterministic)(x_BSD)


class Group(Layer):
    """Consecutive blocks with different mixers, which repeat in this order."""

    deterministic: bool = True

    @nn.compact
    def __call__(self, x_BSD, state: LayerState | None, tokens: TokenSpan, amplitude):
        """As `Block`, with the states of its blocks by their names."""
        states, block = {}, rematerialised(Block, self.config)
        for name, mixer in zip(group_names(self.config), self.config.mixers, strict=True):
            before = state and state.part(name)
            layer = block(self.config, mixer, self.deterministic, name=name)
            x_BSD, states[name] = layer(x_BSD, before, tokens, amplitude)
        return x_BSD, None if state is None else states


def group_names(config: ModelConfig) -> list[str]:
    """The names of a group's blocks, in order; none if all blocks have one mixer."""
    return [f"layer_{i}" for i in range(len(config.mixers))] if len(config.mixers) > 1 else []


def by_layer(config: ModelConfig, blocks: Any, part: str) -> Any:
    """A part that all blocks have, in order of layers: its tree with leaves [L, ...].

    Args:
      config: the architecture.
      blocks: what is under `blocks` in the parameters, or in what a forward pass keeps.
      part: the name of the part in a block, as `integrator`.
    """
    if not (names := group_names(config)):
        return blocks[part]

    def in_order(*leaves):  # of the group's blocks, each [L / n, ...]
        return jnp.stack(leaves, axis=1).reshape(config.num_layers, *leaves[0].shape[1:])

    return jax.tree.map(in_order, *(blocks[name][part] for name in names))


def rematerialised(block: type[Block], config: ModelConfig) -> type[Block]:
    """`block`, of which the backward pass recomputes what `kept_names` does not name."""
    if (names := kept_names(config)) is None:
        return block
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    # A loop over blocks needs no prevent_cse (jax.checkpoint), which costs time. Without it XLA
    # recomputes all blocks of a group at once, and holds them together.
    return nn.remat(block, prevent_cse=len(config.mixers) > 1, policy=policy)


def kept_names(config: ModelConfig) -> tuple[str, ...] | None:
    """Names of the arrays that a block keeps for its gradient; None keeps all that it reads.

    A CPU fills and copies the stacks of what all layers keep, so there `remat none` recomputes what
    takes no product: it costs less than to keep it. Autodiff would compute the iterations again.
    """
    lean = config.integrator_gradient == "lean" or config.num_iterations == 0
    if config.remat == "none" and lean and current_device().platform == "cpu":
        return PRODUCT, TRAJECTORY
    return {"none": None, "integrator": None, "all_but_integrator": (TRAJECTORY,)}.get(
        config.remat, ()
    )


class INLModel(Layer):
    """Embedding, blocks, final norm: token ids to hidden vectors."""

    deterministic: bool = True

    @nn.compact
    def __call__(self, ids_BS, state: DecodeState | None, length_B, amplitude):
        """Returns (hidden [B, S, D] in the compute type, new state)."""
        c = self.config
        dtype = compute_dtype(c)
        # Looked up in float32, so that the embedding's gradient adds up in float32.
        table_dtype = at_least_float32(dtype)
        shape, fan_in = (c.vocab_size, c.d_model), init.normal(c.d_model**-0.5)
        embedding_VD = self.declare("embedding", fan_in, shape, (None, "table"), table_dtype)
        start_B1 = 0 if state is None else state.position_B[:, None]
        position_BS = jnp.broadcast_to(start_B1 + jnp.arange(ids_BS.shape[1]), ids_BS.shape)
        x_BSD = math.sqrt(c.d_model) * look_up(embedding_VD, ids_BS)
        if c.has_sinusoid:
            x_BSD = x_BSD + sinusoid(position_BS, c.d_model, table_dtype)
        x_BSD = nn.Dropout(c.dropout, deterministic=self.deterministic)(x_BSD).astype(dtype)

        kind, fields = (Group, ()) if group_names(c) else (rematerialised(Block, c), c.mixers)
        num_scanned = c.num_layers // len(c.mixers)
        blocks = nn.scan(
            kind,
            length=num_scanned,
            variable_axes={"params": 0, "intermediates": 0, "steps": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(state and LayerState(nn.broadcast, 0), nn.broadcast, nn.broadcast),
            metadata_params={nn.PARTITION_NAME: "layers"},
            # The check traces the block once more, and random numbers would differ without it.
            check_constancy_invariants=self.is_initializing() or not self.deterministic,
        )(c, *fields, self.deterministic, name="blocks")
        tokens = TokenSpan(position_BS, length_B)
        before = state and LayerState(state.layers, jnp.arange(num_scanned))
        x_BSD, layers = blocks(x_BSD, before, tokens, amplitude)
        hidden_BSD = self.norm("final_norm", x_BSD)
        if state is None:
            return hidden_BSD, None
        # Layers of attention return their new entries alone.
        write = functools.partial(write_entries, position_BS=position_BS)
        layers = join_states(c, state.layers, layers, attention=write)
        read_B = ids_BS.shape[1] if length_B is None else length_B
        return hidden_BSD, DecodeState(state.position_B + read_B, layers)


def _second(old, new):
    return new


def join_states(
    config: ModelConfig, old, new, *, attention: Callable = _second, others: Callable = _second
) -> dict[str, Any]:
    """Old and new `DecodeState.layers` joined: by `attention` for caches, by `others` for the rest.

    Both map the two dicts of a mixer's arrays to one; by default to the new one.
    """
    join = [attention if mixer == "attention" else others for mixer in config.mixers]
    if names := group_names(config):
        return {n: one(old[n], new[n]) for n, one in zip(names, join, strict=True)}
    return join[0](old, new)


# --- the model as functions of (config, params, ...)


@functools.partial(jax.jit, static_argnums=0)
def boxed_init(config: ModelConfig, key: jax.Array) -> Any:
    """Fresh parameters, each in a box with the logical names of its axes."""
    ids = jnp.zeros((1, 1), jnp.int32)
    # Through decoding, because the choice of a kernel raises on machines that cannot run it.
    state = init_decode_state(config, 1, 1)
    return INLModel(config).init(key, ids, state, None, 0.0)["params"]


def init_params(config: ModelConfig, key: jax.Array) -> Any:
    """Fresh parameters as a plain dict of arrays, with layers stacked on axis 0 of `blocks`.

    Args:
      config: the architecture.
      key: from `jax.random.key`.
    """
    return unbox(boxed_init(config, key))


def unbox(boxed: Any) -> Any:
    """Parameters without their axis names. (`nn.unbox` would also constrain their sharding.)"""
    return jax.tree.map(
        lambda box: box.value, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    )


@functools.lru_cache(maxsize=64)
def boxed_shapes(config: ModelConfig) -> Any:
    """Shapes and types of `boxed_init`; nothing is allocated. Cached: do not change the tree."""
    key = jax.eval_shape(jax.random.key, 0)
    return jax.eval_shape(functools.partial(boxed_init, config), key)


def abstract_params(config: ModelConfig) -> Any:
    """Shapes and types of `init_params`; nothing is allocated."""
    return unbox(boxed_shapes(config))


def param_count(config: ModelConfig) -> int:
    """The number of parameters; nothing is allocated."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))


def hidden_states(config: ModelConfig, params, input_ids, *, amplitude=None, dropout_key=None):
    """Final hidden vectors, normalised, [B, S, D] in the compute type: the input of `logits`.

    Args:
      config: the architecture.
      params: from `init_params`.
      input_ids: [B, S] integers from 0 up to the vocabulary's size. Check them on the host: JAX
        replaces others without a word (-1 by the last id, too large ones by the largest).
      amplitude: the excitation's A, a number or a traced scalar; the config's by default.
      dropout_key: from `jax.random.key`; None turns dropout off.
    """
    amplitude = config.excitation_amplitude if amplitude is None else amplitude
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    model = INLModel(config, deterministic=dropout_key is None)
    return model.apply({"params": params}, input_ids, None, None, amplitude, rngs=rngs)[0]


def hidden_states_and_steps(config: ModelConfig, params, input_ids):
    """`hidden_states`; and the integrator steps of each token in each layer, int32 [L, B, S].

    Every token takes `num_iterations` steps, or fewer if `tol` is above 0.
    """
    (hidden_BSD, _), kept = INLModel(config).apply(
        {"params": params}, input_ids, None, None, config.excitation_amplitude, mutable="steps"
    )
    if config.tol == 0:
        shape = (config.num_layers, *input_ids.shape)
        return hidden_BSD, jnp.full(shape, config.num_iterations, jnp.int32)
    (steps_LBS,) = by_layer(config, kept["steps"]["blocks"], "integrator")["taken"]
    return hidden_BSD, steps_LBS


def logits(params, hidden_D) -> jax.Array:
    """`hidden E^T` with the tied embedding: float32 (float64 for float64 hidden), [..., V]."""
    return project(embedding_rows(params["embedding"]), hidden_D)


def apply(config: ModelConfig, params, input_ids, *, amplitude=None, dropout_key=None) -> jax.Array:
    """Next-token logits, float32 (float64 for float64 parameters), [B, S, V].

    The arguments are those of `hidden_states`.
    """
    hidden = hidden_states(config, params, input_ids, amplitude=amplitude, dropout_key=dropout_key)
    return logits(params, hidden)


def init_decode_state(config: ModelConfig, batch_size: int, max_len: int) -> DecodeState:
    """The state before the first token, for sequences of up to `max_len` tokens."""
    length = config.num_layers // len(config.mixers)
    states = [
        jax.tree.map(
            lambda a: jnp.zeros((length, *a.shape), a.dtype),
            MIXERS[mixer].state_shapes(config, batch_size, max_len),
        )
        for mixer in config.mixers
    ]
    names = group_names(config)
    layers = dict(zip(names, states, strict=True)) if names else states[0]
    return DecodeState(jnp.zeros(batch_size, jnp.int32), layers)


def decode(config: ModelConfig, params, state: DecodeState, ids_BS, length_B=None):
    """Reads the next tokens of every row into a decoding state.

    Args:
      config: the architecture.
      params: from `init_params`.
      state: from `init_decode_state` or an earlier call.
      ids_BS: the next tokens, padded on the right.
      length_B: the number of real tokens in each row, at least 1; None: all are real.

    Returns:
      Logits after the last real token of each row, [B, V], and the new state.
    """
    hidden_BSD, state = INLModel(config).apply(
        {"params": params}, ids_BS, state, length_B, config.excitation_amplitude
    )
    return logits(params, last_real(hidden_BSD, TokenSpan(None, length_B))), state
