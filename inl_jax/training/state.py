"""All that training changes, and where it lives: shapes, types and shardings before any memory."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from inl_jax.config import InputError, TrainConfig
from inl_jax.model.language_model import abstract_params, init_params
from inl_jax.parallel.sharding import on, param_shardings, with_shardings
from inl_jax.training import spikes
from inl_jax.training.optim import (
    init_optimizer,
    make_optimizer,
    on_host,
    split_blocks,
)


class TrainState(NamedTuple):
    """All that training changes."""

    step: jax.Array  # updates tried, int32
    skipped: jax.Array  # updates of those that were skipped because something was not finite
    params: Any
    opt_state: Any


class Layout(NamedTuple):
    """What a run holds on its devices, as `jax.ShapeDtypeStruct` with shardings.

    Made once for a run and passed on.
    """

    state: TrainState
    gradients: Any  # one for each parameter, in its type


def init_state(key: jax.Array, *, config: TrainConfig) -> TrainState:
    """The state before the first update, with random parameters."""
    return state_from_params(init_params(config.model, key), config=config)


def state_from_params(params: Any, *, config: TrainConfig) -> TrainState:
    """The state before the first update, with given parameters."""
    step, skipped = (jnp.zeros((), jnp.int32) for _ in range(2))  # two buffers, to be donated
    opt_state = init_optimizer(make_optimizer(config), params)
    if config.optim.skip_spikes:
        opt_state["spikes"] = spikes.init_window()
    return TrainState(step, skipped, params, opt_state)


def make_layout(config: TrainConfig, mesh: Mesh) -> Layout:
    """The layout of a run on `mesh`. Nothing is allocated.

    Masters, moments and gradients are sharded as the parameters are; with
    `mesh.fsdp_shards=optimizer` the parameters alone stay whole over `fsdp`. Leaves smaller than
    their parameter (factored moments, counters) are on every device.

    Args:
      config: the run, fitted to `mesh`.
      mesh: from `make_mesh`.

    Raises:
      InputError: the model does not divide over the mesh, or the state is to be in host memory and
        this platform has none that devices can reach.
    """
    with on(mesh):  # as when it is run: JAX then traces the initialisation once
        shapes = abstract_params(config.model)
    on_every_device = NamedSharding(mesh, P())
    sharded = with_shardings(shapes, param_shardings(mesh, config.model))
    params = sharded
    if config.mesh.fsdp_shards == "optimizer":
        whole = param_shardings(mesh, config.model, fsdp_shards="optimizer")
        params = with_shardings(shapes, whole)
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=on_every_device)
    state = TrainState(scalar, scalar, params, _optimizer_layout(config, mesh, sharded))
    return Layout(state, gradients=sharded)


def _optimizer_layout(config: TrainConfig, mesh: Mesh, params: Any) -> dict[str, Any]:
    kinds = {memory.kind for memory in mesh.local_devices[0].addressable_memories()}
    offload = config.optim.state_memory == "pinned_host"
    if offload and "pinned_host" not in kinds:
        raise InputError(
            f"optim.state_memory=pinned_host: {mesh.local_devices[0].device_kind} has only "
            f"{', '.join(sorted(kinds))} memory; set optim.state_memory=device"
        )
    optimizer = make_optimizer(config)
    state = jax.eval_shape(functools.partial(init_optimizer, optimizer), params)

    def place(leaf, param=None):
        same = param is not None and leaf.shape == param.shape
        sharding = param.sharding if same else NamedSharding(mesh, P())
        if offload and on_host(leaf):
            sharding = sharding.with_memory_kind("pinned_host")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    layout = {
        part: optax.tree.map_params(optimizer, place, state[part], tree, transform_non_params=place)
        for part, tree in zip(("blocks", "rest"), split_blocks(params), strict=True)
    }
    if config.optim.skip_spikes:
        window = jax.eval_shape(spikes.init_window)
        everywhere = jax.tree.map(lambda _: NamedSharding(mesh, P()), window)
        layout["spikes"] = with_shardings(window, everywhere)
    return layout


def split_state(state: TrainState) -> dict[str, Any]:
    """A state as a checkpoint holds it: the parameters apart from the rest."""
    rest = state._asdict()
    return {"params": rest.pop("params"), "optimizer": rest}


def join_state(found: dict[str, Any]) -> TrainState:
    """The inverse of `split_state`."""
    return TrainState(params=found["params"], **found["optimizer"])
