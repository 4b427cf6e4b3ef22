"""Where arrays live: the mesh, the one table from logical to mesh axes, and placement from hosts.

The model names its axes. `RULES` alone says what a name means on a mesh.
"""

import collections
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from inl_jax.config import InputError, MeshConfig, ModelConfig, TrainConfig
from inl_jax.model.language_model import boxed_shapes, unbox
from inl_jax.parallel import processes

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the mesh axes that the rows of a batch are sharded over

RULES = (
    ("batch", ROWS),
    # Rows inside `look_up`: over data alone, because fsdp shards the columns of the embedding.
    ("replicas", "data"),
    ("sequence", None),
    ("layers", None),
    # Width D of activations; of norms and biases; of kernels as they are stored.
    ("activation", None),
    ("vector", None),
    ("embed", "fsdp"),
    # Width D of contexts and integrator states: each device of the tensor axis computes its own
    # channels. "state" is the same axis of the integrator's kernels as they are stored.
    ("channels", "tensor"),
    ("state", ("tensor", "fsdp")),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    # Axes of the embedding as it is used, and as it is stored.
    ("vocab", "tensor"),
    ("table", ("fsdp", "tensor")),
)

# The model config's field that sets the size of an axis, for error messages.
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
    """The mesh `data` x `fsdp` x `tensor`.

    A single process may use only the first of its devices; several processes use all.

    Args:
      config: devices along each axis.
      devices: to build the mesh from; `jax.devices()` by default.

    Raises:
      InputError: the product of the axes does not match the number of devices, or the processes
        have unequal numbers of devices.
    """
    hint = ""
    if devices is None:
        devices = jax.devices()
        if devices[0].platform == "cpu" and len(devices) == 1:
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
            f"{fields}: the product must be the number of devices, and there are {n}{hint}; "
            "--mesh.data rest --mesh.fsdp 1 --mesh.tensor 1 fits any number"
        )
    counts = collections.Counter(device.process_index for device in devices)
    if len(set(counts.values())) > 1:
        raise InputError(
            f"process {min(counts, key=counts.get)} has {min(counts.values())} devices and process "
            f"{max(counts, key=counts.get)} has {max(counts.values())}: give all as many"
        )
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, axis_types=types, devices=devices[:wanted])


@contextlib.contextmanager
def on(mesh: Mesh | None, *, split_rows: bool = True) -> Iterator[None]:
    """Sets the mesh and the meaning of logical axes on it. None leaves everything on one device.

    Args:
      mesh: from `make_mesh`.
      split_rows: False keeps the rows of a batch whole on every device, for batches whose number
        of rows is not a multiple of `batch_shards(mesh)`, as prompts are.
    """
    if mesh is None:
        yield
        return
    rules = RULES if split_rows else _without(ROWS, only=("batch", "replicas"))
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        yield


def _without(dropped: Sequence[str], *, only: Sequence[str] = ()) -> tuple:
    """`RULES` without some mesh axes, in the rules named by `only` or in all."""

    def kept(name, axes):
        if only and name not in only:
            return axes
        return tuple(axis for axis in jax.tree.leaves(axes) if axis not in dropped) or None

    return tuple((name, kept(name, axes)) for name, axes in RULES)


def batch_shards(mesh: Mesh) -> int:
    """Number of shards of the batch axis."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def rows(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, P(ROWS))


def shardings_of(tree: Any) -> Any:
    """The sharding of every leaf."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def with_shardings(tree: Any, shardings: Any) -> Any:
    """Shapes and types of `tree`, with shardings, as `jax.ShapeDtypeStruct`."""
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings
    )


def num_bytes(tree: Any) -> int:
    """Bytes of a tree on each device, by the shardings of its leaves."""
    sizes = jax.tree.map(
        lambda a: math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize, tree
    )
    return sum(jax.tree.leaves(sizes))


def param_shardings(mesh: Mesh, config: ModelConfig, *, fsdp_shards: str = "all") -> Any:
    """A sharding for every parameter, by `RULES`.

    Args:
      mesh: from `make_mesh`.
      config: the architecture.
      fsdp_shards: as `MeshConfig.fsdp_shards`; "optimizer" keeps parameters whole over `fsdp`.

    Raises:
      InputError: an axis has no rule, or its size is not a multiple of its number of shards.
    """
    boxed = boxed_shapes(config)
    specs = nn.get_partition_spec(boxed)
    for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=_is_spec):
        for axis in set(spec) - {None} - dict(RULES).keys():
            raise InputError(f"{_name(path)} has the axis {axis!r}, which RULES lacks: add a rule")
    rules = _without(("fsdp",)) if fsdp_shards == "optimizer" else RULES
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


def _is_spec(x: Any) -> bool:
    return isinstance(x, P)


def _name(path) -> str:
    return "/".join(str(k.key) for k in path)


def fit_to_mesh(config: TrainConfig, mesh: Mesh) -> TrainConfig:
    """The config as it runs on `mesh`: a number of `accumulate_steps` lowered until each device has
    rows; auto stays, for `planning.recipe`.

    A micro-batch needs at least one row per device. The mean over fewer micro-batches is the same
    (but for rounding, and for the draws of dropout), so a config for one device runs on many. Call
    it once, right after the mesh is made: the step, the memory estimate and the checks below take
    the fitted config.

    Raises:
      InputError: `batch_size` is not a multiple of the number of batch shards.
    """
    rows_per_shard, left_over = divmod(config.batch_size, batch_shards(mesh))
    if left_over:
        raise InputError(
            f"batch_size={config.batch_size}: must be a multiple of the {batch_shards(mesh)} "
            "devices that share the batch (mesh.data x mesh.fsdp); change one of them"
        )
    if config.accumulate_steps == "auto":
        return config
    steps = max(k for k in range(1, config.accumulate_steps + 1) if rows_per_shard % k == 0)
    return dataclasses.replace(config, accumulate_steps=steps)


def local_rows(mesh: Mesh, batch_size: int) -> slice:
    """The rows of a global batch that this process reads: those that its devices hold.

    If the tensor axis spans processes, several of them hold and read the same rows.
    """
    held = rows(mesh).addressable_devices_indices_map((batch_size,)).values()
    ends = [index.indices(batch_size) for (index,) in held]
    return slice(min(start for start, _, _ in ends), max(stop for _, stop, _ in ends))


def place(mesh: Mesh, local: np.ndarray) -> jax.Array:
    """A global array, sharded by rows, from the `local_rows` of each process."""
    held = local_rows(mesh, batch_shards(mesh))  # as if each shard had one row
    each = len(local) // (held.stop - held.start)
    first, shape = held.start * each, (batch_shards(mesh) * each, *local.shape[1:])

    def part(index):
        start, stop, _ = index[0].indices(shape[0])
        return local[start - first : stop - first]

    return jax.make_array_from_callback(shape, rows(mesh), part)


def put(leaf: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array that every process has, in its shards: each process keeps those of its devices."""
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])


def fetch(array: jax.Array) -> np.ndarray:
    """The whole array on the host of every process. All processes call it together."""
    if not (array.is_fully_addressable or array.is_fully_replicated):
        array = _copy_to_all(array.shape, array.dtype, array.sharding)(array)
    return np.asarray(array)


@functools.cache
def _copy_to_all(shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding) -> Callable:
    return _compiled(jnp.copy, jax.ShapeDtypeStruct(shape, dtype, sharding=sharding))


def _compiled(function: Callable, argument: jax.ShapeDtypeStruct) -> Callable:
    """`function` of one sharded array, compiled; its result is whole on every device."""
    whole = NamedSharding(argument.sharding.mesh, P())
    compiled = jax.jit(function, out_shardings=whole).lower(argument).compile()
    return processes.meeting_first(compiled)


def any_process(mesh: Mesh) -> Callable[[bool], bool]:
    """A function `vote(flag)` that tells whether any process passed True, the same on all.

    Every process calls it once per update. It returns the vote of the *previous* call, which the
    devices have counted by then, so no process waits. A single process has the answer at once.
    """
    if jax.process_count() == 1:
        return bool
    one_each, counted = NamedSharding(mesh, P(AXES)), None
    collect = _compiled(jnp.any, jax.ShapeDtypeStruct((mesh.size,), bool, sharding=one_each))

    def vote(flag: bool) -> bool:
        nonlocal counted
        before, mine = counted, np.array([flag])
        counted = collect(jax.make_array_from_callback((mesh.size,), one_each, lambda _: mine))
        return before is not None and bool(before)

    return vote
