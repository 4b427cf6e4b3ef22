"""AdamW (or Adafactor) under warmup-cosine, for 16-bit parameters, applied one layer at a time.

An optimizer here is an optax transformation that treats every layer by itself. `apply_gradients`
does what concerns them all (clipping, leaving out a non-finite update) and goes through the layers
in a loop, so that only one layer's optimizer state is unpacked, widened or on the device at a time.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from inl_jax.config import TrainConfig

STACKED = "blocks"  # the parameters whose first axis is the layer


class MasterState(NamedTuple):
    """Float32 copies of 16-bit parameters, and the state of the optimizer that moves them."""

    masters: Any
    inner: Any


def learning_rate_schedule(config: TrainConfig, num_steps: int) -> optax.Schedule:
    """Linear warmup from 0, then cosine to `final_lr_fraction` of the peak at `num_steps`."""
    o = config.optim
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=o.learning_rate,
        warmup_steps=o.warmup_steps,
        decay_steps=num_steps,
        end_value=o.learning_rate * o.final_lr_fraction,
    )


def decay_mask(params: Any) -> Any:
    """True for the leaves that weight decay applies to: kernels and the embedding."""

    def decays(path, _):
        return path[-1].key.endswith(("kernel", "embedding"))

    return jax.tree_util.tree_map_with_path(decays, params)


# --- 16-bit parameters and moments


def stochastic_round(key: jax.Array, x: jax.Array) -> jax.Array:
    """`x` in bfloat16: one of its two neighbours, so chosen that the mean over keys is `x`.

    Random bits are added to the 16 bits that bfloat16 drops (Gupta et al., 2015). Infinities and
    NaN stay what they are. The result does not depend on how `x` is spread over devices.
    """
    x = x.astype(jnp.float32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = (jax.lax.bitcast_convert_type(x, jnp.uint32) + noise) & jnp.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def round_tree(key: jax.Array, tree: Any, like: Any) -> Any:
    """`tree` in the types of `like`: where that is bfloat16, rounded stochastically."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, max(1, len(leaves)))
    rounded = [
        stochastic_round(k, new) if old.dtype == jnp.bfloat16 else new
        for k, new, old in zip(keys, leaves, jax.tree.leaves(like), strict=True)
    ]
    return jax.tree.unflatten(structure, rounded)


def _landing(target: Any, params: Any) -> Any:
    """The float32 updates that take `params` exactly to `target`, of the same types."""
    return jax.tree.map(lambda t, p: t.astype(jnp.float32) - p.astype(jnp.float32), target, params)


def with_float32_masters(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Runs `inner` on float32 master weights and lands the parameters on the masters' rounding.

    Added to a bfloat16 weight, an AdamW update at a small learning rate is below half a unit in
    the last place and vanishes. Here updates add up in the masters, and the emitted update takes
    each parameter to `bfloat16(master)`.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params):
        masters = optax.tree.cast(params, jnp.float32)
        return MasterState(masters, inner.init(masters))

    def update(updates, state, params, **extra):
        updates, inner_state = inner.update(updates, state.inner, state.masters, **extra)
        masters = optax.apply_updates(state.masters, updates)
        target = jax.tree.map(lambda m, p: m.astype(p.dtype), masters, params)
        return _landing(target, params), MasterState(masters, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def with_stochastic_rounding(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Runs `inner` on bfloat16 parameters, whose new values are rounded stochastically.

    Needs no masters: an update far below a unit in the last place moves the weight with a
    probability in proportion, and so by its own size in the mean. `update` takes `key`, a new one
    each time.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params):
        return inner.init(optax.tree.cast(params, jnp.float32))

    def update(updates, state, params, *, key, **extra):
        key, inner_key = jax.random.split(key)
        wide = optax.tree.cast(params, jnp.float32)
        updates, state = inner.update(updates, state, wide, key=inner_key, **extra)
        target = round_tree(key, optax.apply_updates(wide, updates), params)
        return _landing(target, params), state

    return optax.GradientTransformationExtraArgs(init, update)


def with_bfloat16_state(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the float state of `inner` in bfloat16, rounded stochastically after each update.

    Rounded to nearest, a moment stands still where its change is below half a unit in the last
    place: with b2 = 0.999 a second moment would hardly ever shrink. `update` takes `key`.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params):
        return _cast_floats(inner.init(params), jnp.bfloat16)

    def update(updates, state, params, *, key, **extra):
        updates, new = inner.update(updates, _cast_floats(state, jnp.float32), params, **extra)
        return updates, round_tree(key, new, state)

    return optax.GradientTransformationExtraArgs(init, update)


def _cast_floats(tree: Any, dtype) -> Any:
    def cast(leaf):
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)


# --- the optimizer of a run


def make_optimizer(config: TrainConfig, num_steps: int) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a run of `num_steps` updates, for one layer or all. Feed it float32
    gradients, and a `key` where it rounds stochastically.
    """
    o, rate = config.optim, learning_rate_schedule(config, num_steps)
    if o.optimizer == "adafactor":
        # Shazeer and Stern (2018) without momentum; steps as AdamW's, not relative to the weights.
        optimizer = optax.chain(
            optax.scale_by_factored_rms(min_dim_size_to_factor=64),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(o.weight_decay, mask=decay_mask),
            optax.scale_by_learning_rate(rate),
        )
    else:
        optimizer = optax.adamw(
            rate, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, mask=decay_mask
        )
    if o.moment_dtype == "bfloat16":
        optimizer = with_bfloat16_state(optimizer)
    if config.model.param_dtype == "bfloat16":
        wrap = with_float32_masters if o.rounding == "masters" else with_stochastic_rounding
        optimizer = wrap(optimizer)
    return optax.with_extra_args_support(optimizer)


def any_length_optimizer(config: TrainConfig) -> optax.GradientTransformationExtraArgs:
    """An optimizer to make states with: their shapes do not depend on the length of the run."""
    return make_optimizer(config, config.optim.warmup_steps + 1)


def accumulator_dtype(config: TrainConfig) -> jnp.dtype:
    """The type in which gradients of micro-batches are added up."""
    if config.optim.accumulator_dtype == "bfloat16":
        return jnp.dtype(jnp.bfloat16)
    return jnp.promote_types(jnp.float32, config.model.param_dtype)


def init_optimizer(optimizer: optax.GradientTransformation, params: Any) -> dict[str, Any]:
    """The optimizer's state of the stacked blocks, layer by layer, and of the rest.

    Returns:
      `{"blocks": ..., "rest": ...}`; under `blocks` every leaf has the layer as first axis.
    """
    blocks, rest = split_blocks(params)
    return {"blocks": jax.vmap(optimizer.init)(blocks), "rest": optimizer.init(rest)}


def split_blocks(tree: Any) -> tuple[Any, Any]:
    """What has a first axis of layers, and what has not."""
    return tree[STACKED], {name: value for name, value in tree.items() if name != STACKED}


def on_host(leaf: Any) -> bool:
    """Whether a leaf of the optimizer's state goes to host memory, where that is asked for."""
    return leaf.ndim > 1


def apply_gradients(
    optimizer: optax.GradientTransformationExtraArgs,
    grads: Any,
    state: Any,
    params: Any,
    *,
    scale=1.0,
    keep=False,
    key: jax.Array | None = None,
) -> tuple[Any, Any]:
    """Updates parameters and optimizer state in place, one layer after the other.

    Args:
      optimizer: from `make_optimizer`.
      grads: gradients, in any float type; widened to float32 a layer at a time.
      state: from `init_optimizer`. What of it is in host memory is brought to the device, layer by
        layer, and back.
      params: the parameters.
      scale: what gradients are multiplied with, as for clipping by the global norm.
      keep: true to leave everything as it was.
      key: random key of this update; needed where the optimizer rounds stochastically.

    Returns:
      (params, state).
    """
    key = jax.random.key(0) if key is None else key

    def put(tree, like, space):
        """Moves the parts of those leaves of `like` that are in host memory."""

        def move(part, whole):
            on_host = jax.typeof(whole).memory_space == jax.memory.Space.Host
            return jax.device_put(part, space) if on_host else part

        return jax.tree.map(move, tree, like)

    def update(grads, state, params, key, *, like):
        state = put(state, like, jax.memory.Space.Device)
        wide = jax.tree.map(
            lambda g: scale * g.astype(jnp.promote_types(jnp.float32, g.dtype)), grads
        )
        updates, new_state = optimizer.update(wide, state, params, key=key)
        new = optax.apply_updates(params, updates), new_state
        params, state = jax.tree.map(lambda n, o: jnp.where(keep, o, n), new, (params, state))
        return params, put(state, like, jax.memory.Space.Host)

    def one_layer(i, carry):
        params, state = carry
        layer = functools.partial(jax.lax.dynamic_index_in_dim, index=i, keepdims=False)
        new = update(
            *(jax.tree.map(layer, tree) for tree in (blocks[0], state, params)),
            jax.random.fold_in(key, i),
            like=state,
        )
        return jax.tree.map(
            lambda whole, part: jax.lax.dynamic_update_index_in_dim(whole, part, i, 0),
            (params, state),
            new,
        )

    blocks, rest = zip(split_blocks(grads), split_blocks(params), strict=True)
    num_layers = len(jax.tree.leaves(blocks[0])[0])
    new_blocks, blocks_state = jax.lax.fori_loop(
        0, num_layers, one_layer, (blocks[1], state["blocks"])
    )
    new_rest, rest_state = update(
        rest[0], state["rest"], rest[1], jax.random.fold_in(key, num_layers), like=state["rest"]
    )
    return {**new_rest, STACKED: new_blocks}, {"blocks": blocks_state, "rest": rest_state}
