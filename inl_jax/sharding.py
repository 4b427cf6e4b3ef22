"""Where arrays live: the mesh, one table from logical axes to mesh axes, and host placement.

The model names its axes; nothing but `RULES` says what they mean on a mesh.
"""

import math
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from inl_jax.config import InputError, MeshConfig, ModelConfig, TrainConfig
from inl_jax.model import boxed_init, unbox

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the mesh axes that split the rows of a batch

RULES = (
    ("batch", ROWS),
    ("sequence", None),
    ("activation", None),
    ("layers", None),
    ("norm", None),
    ("embed", "fsdp"),
    ("context", None),
    ("vocab", "tensor"),
    ("mlp", "tensor"),
    ("controller", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
)


def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh `data` x `fsdp` x `tensor`: over all devices, or over the first few of one process.

    Raises:
      InputError: there are too few devices, or the rest cannot be shared out evenly.
    """
    n, shared = jax.device_count(), config.fsdp * config.tensor
    data = n // shared if config.data == "rest" else config.data
    wanted = data * shared
    if not 0 < wanted <= n or (wanted < n and (config.data == "rest" or jax.process_count() > 1)):
        raise InputError(
            f"mesh.data={config.data}, mesh.fsdp={config.fsdp}, mesh.tensor={config.tensor}: "
            f"the product must be the number of devices, {n}, or less with mesh.data a number"
        )
    shape = (data, config.fsdp, config.tensor)
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, axis_types=types, devices=jax.devices()[:wanted])


def row_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def rows(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, P(ROWS))


def param_shardings(mesh: Mesh, config: ModelConfig) -> Any:
    """A sharding for every parameter, by `RULES`.

    Raises:
      InputError: an axis does not divide over the mesh.
    """
    boxed = jax.eval_shape(lambda key: boxed_init(config, key), jax.random.key(0))
    specs = nn.get_partition_spec(boxed)
    shardings = nn.logical_to_mesh_sharding(specs, mesh, RULES)

    def check(path, leaf, sharding):
        try:
            sharding.shard_shape(leaf.shape)
        except ValueError:
            name = "/".join(str(k.key) for k in path)
            raise InputError(
                f"{name} of shape {leaf.shape} does not divide over the mesh axes "
                f"{sharding.spec} of {dict(mesh.shape)}: choose mesh.fsdp and mesh.tensor that do"
            ) from None

    jax.tree_util.tree_map_with_path(check, unbox(boxed), shardings)
    return shardings


def optimizer_shardings(
    mesh: Mesh, params: Any, optimizer: optax.GradientTransformation, abstract_state: Any
) -> Any:
    """A sharding for every leaf of an optimizer state: its parameter's, or replicated.

    Args:
      mesh: the mesh.
      params: `param_shardings`.
      optimizer: the optimizer.
      abstract_state: shapes of its state.
    """
    return optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        abstract_state,
        params,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
    )


def check_rows(config: TrainConfig, mesh: Mesh) -> None:
    """Raises `InputError` where a micro-batch does not divide over the devices."""
    micro = config.batch_size // config.accumulate_steps
    if micro % row_shards(mesh) != 0:
        raise InputError(
            f"batch_size={config.batch_size} in accumulate_steps={config.accumulate_steps} gives "
            f"micro-batches of {micro} sequences, which do not divide over {row_shards(mesh)} "
            "devices (mesh.data x mesh.fsdp): change one of them"
        )


def local_rows(batch_size: int) -> slice:
    """This process's contiguous rows of a global batch."""
    each = batch_size // jax.process_count()
    return slice(jax.process_index() * each, (jax.process_index() + 1) * each)


def place(mesh: Mesh, local: np.ndarray) -> jax.Array:
    """A global array from each process's own rows."""
    return jax.make_array_from_process_local_data(rows(mesh), local)
