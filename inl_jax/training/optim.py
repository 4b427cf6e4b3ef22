"""AdamW or Adafactor for 16-bit parameters, applied one layer at a time.

An optimizer here is an optax transformation that treats every layer alone and takes the learning
rate as an argument of `update`: it does not know how long the run is. `learning_rates` is the
schedule. `apply_gradients` does what concerns all layers (clipping, skipping a non-finite update)
and loops over the layers, so that the optimizer state of only one layer is on the device, or
widened to float32, at a time. With `attention_every` the loop is over groups of so many layers.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from inl_jax.config import OptimConfig, TrainConfig
from inl_jax.model.layers import at_least_float32

STACKED = "blocks"  # the parameters whose first axis is the layer


class MasterState(NamedTuple):
    """Float32 copies of 16-bit parameters, and the state of the optimizer that updates them."""

    masters: Any
    inner: Any


def learning_rates(config: OptimConfig, num_steps: int) -> np.ndarray:
    """The learning rate of every update of a run, float32 [num_steps].

    Warmup is linear and counts from 1: update `u` of `warmup_steps` has `u / warmup_steps` of the
    peak, so that the first update is not lost. What follows it is `config.schedule`:

    cosine    a cosine to `final_lr_fraction` of the peak at the last update
              (optax.warmup_cosine_decay_schedule)
    wsd       the peak, then a line to `final_lr_fraction` of it over the last `decay_fraction` of
              the run. Until then the rates do not depend on `num_steps`: a longer run shares them,
              and one that has fallen may rise to the peak again (Wen et al., 2024).
    constant  the peak
    """
    peak, warmup, lowest = config.learning_rate, config.warmup_steps, config.final_lr_fraction
    update = np.arange(1, num_steps + 1)
    if config.schedule == "cosine":
        cosine = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, num_steps, peak * lowest)
        return np.asarray(jax.jit(cosine)(update), np.float32)  # one program in place of eight
    rates = peak * np.minimum(1, update / max(1, warmup))
    if config.schedule == "wsd":
        falling = max(1, round(config.decay_fraction * num_steps))
        rates *= 1 - (1 - lowest) * np.clip(1 - (num_steps - update) / falling, 0, 1)
    return rates.astype(np.float32)


def decay_mask(params: Any) -> Any:
    """True for the leaves that weight decay applies to: kernels and the embedding."""

    def decays(path, _):
        return path[-1].key.endswith(("kernel", "embedding"))

    return jax.tree_util.tree_map_with_path(decays, params)


# --- 16-bit parameters and moments


def stochastic_round(key: jax.Array, x: jax.Array) -> jax.Array:
    """`x` rounded up or down to bfloat16 at random, with mean `x` (Gupta et al., 2015).

    Random bits are added to the 16 bits that bfloat16 drops. Infinities and NaN are kept. The
    result does not depend on the sharding of `x`.
    """
    x = x.astype(jnp.float32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = (jax.lax.bitcast_convert_type(x, jnp.uint32) + noise) & jnp.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def round_tree(key: jax.Array, tree: Any, like: Any) -> Any:
    """`tree` in the types of `like`. Leaves that become bfloat16 are rounded stochastically."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, max(1, len(leaves)))
    rounded = [
        stochastic_round(k, new) if old.dtype == jnp.bfloat16 else new
        for k, new, old in zip(keys, leaves, jax.tree.leaves(like), strict=True)
    ]
    return jax.tree.unflatten(structure, rounded)


def _landing(target: Any, params: Any) -> Any:
    """The float32 updates that move `params` exactly onto `target`, of the same types."""
    return jax.tree.map(lambda t, p: t.astype(jnp.float32) - p.astype(jnp.float32), target, params)


def with_float32_masters(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Applies `inner` to float32 master weights and moves each parameter to `bfloat16(master)`.

    An AdamW update at a small learning rate is below half a unit in the last place of a bfloat16
    weight, so it would vanish if it were added there. The masters accumulate it.
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
    """Applies `inner` to bfloat16 parameters and rounds their new values stochastically.

    No masters are needed: an update far below a unit in the last place moves the weight with a
    probability proportional to its size, so its mean is right. `update` takes a new `key` each
    time.
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

    Rounding to nearest would freeze a moment whose change is below half a unit in the last place:
    with b2 = 0.999 a second moment would hardly ever shrink. `update` takes a `key`.
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


def make_optimizer(config: TrainConfig) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a run, for the parameters of one layer or of all.

    `update(gradients, state, params, learning_rate=..., key=...)` takes float32 gradients; `key`
    is used only where something is rounded stochastically.
    """
    o = config.optim
    decay = optax.add_decayed_weights(o.weight_decay, mask=decay_mask)
    if o.optimizer == "adafactor":
        # Shazeer and Stern (2018) without momentum; steps as AdamW's, not relative to the weights.
        direction = [
            optax.scale_by_factored_rms(min_dim_size_to_factor=64),
            optax.clip_by_block_rms(1.0),
        ]
    else:
        direction = [optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.eps)]
    optimizer = optax.chain(*direction, decay, _scale_by_learning_rate())
    if o.moment_dtype == "bfloat16":
        optimizer = with_bfloat16_state(optimizer)
    if config.model.param_dtype == "bfloat16":
        wrap = with_float32_masters if o.rounding == "masters" else with_stochastic_rounding
        optimizer = wrap(optimizer)
    return optax.with_extra_args_support(optimizer)


def _scale_by_learning_rate() -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by `-learning_rate`, an argument of `update`."""

    def update(updates, state, params=None, *, learning_rate, **extra):
        del params, extra
        return jax.tree.map(lambda u: -learning_rate * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def accumulator_dtype(config: TrainConfig) -> jnp.dtype:
    """The type in which the mean over micro-batches is accumulated."""
    if config.optim.accumulator_dtype == "bfloat16":
        return jnp.dtype(jnp.bfloat16)
    return at_least_float32(config.model.param_dtype)


def init_optimizer(optimizer: optax.GradientTransformation, params: Any) -> dict[str, Any]:
    """The optimizer state `{"blocks": ..., "rest": ...}`.

    Every leaf under `blocks` has the layer as its first axis.
    """
    blocks, rest = split_blocks(params)
    return {"blocks": jax.vmap(optimizer.init)(blocks), "rest": optimizer.init(rest)}


def split_blocks(tree: Any) -> tuple[Any, Any]:
    """Splits a tree by parameters into (stacked blocks, the rest)."""
    return tree[STACKED], {name: value for name, value in tree.items() if name != STACKED}


def on_host(leaf: Any) -> bool:
    """Whether `state_memory=pinned_host` moves this leaf of the optimizer state to the host."""
    return leaf.ndim > 1


def apply_gradients(
    optimizer: optax.GradientTransformationExtraArgs,
    grads: Any,
    state: Any,
    params: Any,
    *,
    learning_rate: jax.Array | float,
    scale: jax.Array | float = 1.0,
    skip: jax.Array | bool = False,
    key: jax.Array | None = None,
) -> tuple[Any, Any]:
    """Updates parameters and optimizer state in place, one layer after the other.

    Leaves of the state in host memory are copied to the device and back, one layer at a time.

    Args:
      optimizer: from `make_optimizer`.
      grads: gradients in any float type; widened to float32 one layer at a time.
      state: from `init_optimizer`.
      params: the parameters.
      learning_rate: of this update, a scalar.
      scale: factor of the gradients, for clipping by the global norm.
      skip: True leaves parameters and state as they are.
      key: of this update; needed if the optimizer rounds stochastically.

    Returns:
      (params, state).
    """
    key = jax.random.key(0) if key is None else key

    def put(tree, like, space):
        """Moves those leaves to `space` that `like` has in host memory."""

        def move(part, whole):
            on_host = jax.typeof(whole).memory_space == jax.memory.Space.Host
            return jax.device_put(part, space) if on_host else part

        return jax.tree.map(move, tree, like)

    def update(grads, state, params, key, *, like):
        state = put(state, like, jax.memory.Space.Device)
        wide = jax.tree.map(lambda g: scale * g.astype(at_least_float32(g)), grads)
        updates, new_state = optimizer.update(
            wide, state, params, learning_rate=learning_rate, key=key
        )
        new = optax.apply_updates(params, updates), new_state
        params, state = jax.tree.map(lambda n, o: jnp.where(skip, o, n), new, (params, state))
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
