"""The model's side of sharding: how modules declare parameters, and where these are gathered.

Modules name the axes of parameters and activations; `sharding.RULES` says what the names mean on a
mesh. Without a mesh nothing here does anything.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

# Axes that are split further where parameters are kept than where they are used: their names there.
_IN_USE = {"embed": "activation", "state": "channels"}


def declare(module: nn.Module, name: str, initializer, shape, axes, *, param_dtype, dtype=None):
    """A parameter of `module` with logical axis names, gathered for use and then cast.

    Args:
      module: being called.
      name: of the parameter.
      initializer: as in `flax.linen.initializers`.
      shape: its shape.
      axes: a logical name (or None) for each of its axes.
      param_dtype: what it is stored in, and gathered in.
      dtype: what it is used in; as stored by default.
    """
    boxed = nn.with_logical_partitioning(initializer, axes)
    value = module.param(name, boxed, shape, jnp.dtype(param_dtype))
    return gathered(value, axes).astype(dtype or param_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(param: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """A parameter as it is used: all-gathered over `fsdp`, once for all its uses.

    Left to itself XLA gathers at every use, after slices and casts, again in each iteration of a
    loop. Its gradient goes back the same way: reduce-scattered, once.
    """
    return nn.with_logical_constraint(param, tuple(_IN_USE.get(axis, axis) for axis in axes))


def _gathered_forward(param, axes):
    return gathered(param, axes), None


def _gathered_backward(axes, _, gradient):
    return (nn.with_logical_constraint(gradient, axes),)


gathered.defvjp(_gathered_forward, _gathered_backward)


def row_shards(num_rows: int) -> int:
    """Into how many parts the rows of a batch are split here; 1 where they do not divide."""
    mesh, (axes,) = jax.sharding.get_abstract_mesh(), nn.logical_to_mesh_axes(("batch",))
    if mesh.empty or not axes:
        return 1
    shards = math.prod(mesh.shape[axis] for axis in axes)
    return shards if num_rows % shards == 0 else 1


def by_row_shard(tree: Any, num_shards: int) -> Any:
    """Arrays [B, ...] as [N, B / N, ...], the first axis one part of the rows for each device.

    What is summed over rows within the parts, and over the parts at the end, is exchanged once.
    """
    return jax.tree.map(lambda a: a.reshape(num_shards, -1, *a.shape[1:]), tree)
