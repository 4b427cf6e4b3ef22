"""Where arrays live: the mesh, one table from logical axes to mesh axes, and host placement.

The model names its axes; nothing but `RULES` says what they mean on a mesh.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from inl_jax.config import InputError, MeshConfig, ModelConfig, TrainConfig
from inl_jax.model.language_model import abstract_params, boxed_shapes, unbox
from inl_jax.training.optim import any_length_optimizer, init_optimizer, on_host, split_blocks

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the mesh axes that split the rows of a batch

RULES = (
    ("batch", ROWS),
    ("replicas", "data"),  # rows, on devices that look each other's up
    ("sequence", None),
    ("layers", None),
    # Widths D, where nothing splits them but fsdp: of activations, norms, and kept parameters.
    ("activation", None),
    ("norm", None),
    ("embed", "fsdp"),
    # Widths D of which every device of the tensor axis computes its own channels: of contexts and
    # integrator states; and of the integrator's parameters as they are kept.
    ("channels", "tensor"),
    ("state", ("tensor", "fsdp")),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    # The embedding, as it is used and as it is kept.
    ("vocab", "tensor"),
    ("table", ("fsdp", "tensor")),
)

# The field of a model's config that is the size of an axis.
_FIELDS = {
    "embed": "d_model",
    "channels": "d_model",
    "state": "d_model",
    "table": "d_model",
    "mlp": "d_ff",
    "heads": "num_heads",
    "kv_heads": "num_kv_heads",
}


def make_mesh(config: MeshConfig, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh `data` x `fsdp` x `tensor`: over all devices, or over the first few of one process.

    Args:
      config: its sizes.
      devices: what to lay it over; JAX's own devices by default.

    Raises:
      InputError: there are too few devices, or the rest cannot be shared out evenly.
    """
    hint = ""
    if devices is None:
        devices = jax.devices()
        if devices[0].platform == "cpu":
            hint = "; JAX_NUM_CPU_DEVICES=8 makes eight of a CPU"
    sizes, n = {axis: getattr(config, axis) for axis in AXES}, len(devices)
    known = math.prod(size for size in sizes.values() if size != "rest")
    shape = tuple(n // known if size == "rest" else size for size in sizes.values())
    wanted = math.prod(shape)
    if not 0 < wanted <= n or (
        wanted < n and ("rest" in sizes.values() or jax.process_count() > 1)
    ):
        fields = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
        raise InputError(
            f"{fields}: the product must be the number of devices, and there are {n}{hint}"
        )
    counts = collections.Counter(device.process_index for device in devices)
    if len(set(counts.values())) > 1:
        raise InputError(
            f"process {min(counts, key=counts.get)} has {min(counts.values())} devices and process "
            f"{max(counts, key=counts.get)} has {max(counts.values())}: give all as many"
        )
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, axis_types=types, devices=devices[:wanted])


def row_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def rows(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, P(ROWS))


def param_shardings(mesh: Mesh, config: ModelConfig, *, fsdp_shards: str = "all") -> Any:
    """A sharding for every parameter, by `RULES`.

    Args:
      mesh: the mesh.
      config: the architecture.
      fsdp_shards: as `MeshConfig.fsdp_shards`; "optimizer" keeps parameters whole over `fsdp`.

    Raises:
      InputError: an axis has no rule, or does not divide over the mesh.
    """
    boxed = boxed_shapes(config)
    specs = nn.get_partition_spec(boxed)
    for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=_is_spec):
        for axis in set(spec) - {None} - dict(RULES).keys():
            raise InputError(f"{_name(path)} has the axis {axis!r}, which RULES lacks: add a rule")
    rules = RULES
    if fsdp_shards == "optimizer":
        rules = tuple((name, _without_fsdp(axes)) for name, axes in RULES)
    shardings = nn.logical_to_mesh_sharding(specs, mesh, rules)

    def check(path, leaf, spec, sharding):
        if len(sharding.spec) < leaf.ndim:
            raise InputError(f"{_name(path)} of shape {leaf.shape} does not name its axes")
        for size, name, axes in zip(leaf.shape, spec, sharding.spec, strict=True):
            axes = jax.tree.leaves(axes)
            if size % (parts := math.prod(mesh.shape[axis] for axis in axes)):
                raise InputError(
                    f"model.{_FIELDS[name]}={size}: does not divide over {parts} devices "
                    f"({' x '.join(f'mesh.{axis}' for axis in axes)}; {_name(path)} of shape "
                    f"{leaf.shape}); change one of them"
                )

    jax.tree_util.tree_map_with_path(check, unbox(boxed), specs, shardings)
    return shardings


def _without_fsdp(axes):
    kept = tuple(axis for axis in jax.tree.leaves(axes) if axis != "fsdp")
    return kept or None


def _is_spec(x: Any) -> bool:
    return isinstance(x, P)


def _name(path) -> str:
    return "/".join(str(k.key) for k in path)


def abstract_optimizer_state(config: TrainConfig, mesh: Mesh) -> Any:
    """Shapes, types and shardings of the optimizer's state, without allocating.

    Masters and moments lie as their parameters do (with `fsdp_shards="optimizer"`, as these would
    with "all"), in host memory where the config says so. What is smaller than its parameter
    (factored moments, counters) is on every device.

    Raises:
      InputError: the state is to be in host memory, which this platform does not have.
    """
    offload = config.optim.state_memory == "pinned_host"
    if offload and "pinned_host" not in _memory_kinds(mesh):
        raise InputError(
            f"optim.state_memory=pinned_host: {mesh.local_devices[0].device_kind} has only "
            f"{', '.join(sorted(_memory_kinds(mesh)))} memory; set optim.state_memory=device"
        )
    optimizer = any_length_optimizer(config)
    params = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        abstract_params(config.model),
        param_shardings(mesh, config.model),
    )
    state = jax.eval_shape(functools.partial(init_optimizer, optimizer), params)

    def place(leaf, param=None):
        same = param is not None and leaf.shape == param.shape
        sharding = param.sharding if same else NamedSharding(mesh, P())
        if offload and on_host(leaf):
            sharding = sharding.with_memory_kind("pinned_host")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return {
        part: optax.tree.map_params(optimizer, place, state[part], tree, transform_non_params=place)
        for part, tree in zip(("blocks", "rest"), split_blocks(params), strict=True)
    }


def _memory_kinds(mesh: Mesh) -> set[str]:
    return {memory.kind for memory in mesh.local_devices[0].addressable_memories()}


def spread_rows(config: TrainConfig, mesh: Mesh) -> TrainConfig:
    """The config with its `accumulate_steps` lowered to what every device has rows for.

    A micro-batch needs a row for each device. In how many of them an update comes does not change
    it, so a config for one device holds for many; none of them then has more rows at a time.

    Raises:
      InputError: the batch does not divide over the devices.
    """
    each, left = divmod(config.batch_size, row_shards(mesh))
    if left:
        raise InputError(
            f"batch_size={config.batch_size}: does not divide over {row_shards(mesh)} devices "
            "(mesh.data x mesh.fsdp); change one of them"
        )
    steps = max(k for k in range(1, config.accumulate_steps + 1) if each % k == 0)
    return dataclasses.replace(config, accumulate_steps=steps)


def local_rows(mesh: Mesh, batch_size: int) -> slice:
    """The rows of a global batch that this process reads: those its devices hold.

    Where the tensor axis goes across processes, several of them hold and read the same rows.
    """
    held = rows(mesh).addressable_devices_indices_map((batch_size,)).values()
    ends = [index.indices(batch_size) for (index,) in held]
    return slice(min(start for start, _, _ in ends), max(stop for _, stop, _ in ends))


def place(mesh: Mesh, local: np.ndarray) -> jax.Array:
    """A global array from each process's `local_rows`."""
    held = local_rows(mesh, row_shards(mesh))  # of one row for each shard
    each = len(local) // (held.stop - held.start)
    first, shape = held.start * each, (row_shards(mesh) * each, *local.shape[1:])

    def part(index):
        start, stop, _ = index[0].indices(shape[0])
        return local[start - first : stop - first]

    return jax.make_array_from_callback(shape, rows(mesh), part)


def fetch(array: jax.Array) -> np.ndarray:
    """The whole of an array on the host of every process, which all ask for it together."""
    if not (array.is_fully_addressable or array.is_fully_replicated):
        mesh = array.sharding.mesh
        array = jax.jit(jnp.copy, out_shardings=NamedSharding(mesh, P()))(array)
    return np.asarray(array)


def any_process(mesh: Mesh) -> Callable[[bool], bool]:
    """A function that says whether any process has called it with True, with one answer on all.

    Every process calls it once for each update. The answer is that of the call before, which the
    devices have by then, so that nobody waits for it. One process alone has it at once.
    """
    if jax.process_count() == 1:
        return bool
    one_each, vote = NamedSharding(mesh, P(AXES)), None
    collect = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))

    def ask(flag: bool) -> bool:
        nonlocal vote
        before, mine = vote, np.array([flag])
        vote = collect(jax.make_array_from_callback((mesh.size,), one_each, lambda _: mine))
        return before is not None and bool(before)

    return ask
