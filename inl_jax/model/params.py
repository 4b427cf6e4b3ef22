"""The model's side of sharding: declare and gather parameters, split rows and positions.

Modules name the axes of parameters and activations; the table in `parallel/sharding.py` says what
the names mean on a mesh. Without a mesh, names have no effect.

Shapes: B rows of a batch, N shards of them, S positions, n chunks of K positions, X anything.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

# Logical axes along which a stored parameter is sharded further than a used one: their name in use.
_IN_USE = {"embed": "activation", "state": "channels"}


def declare(module: nn.Module, name: str, initializer, shape, axes, *, param_dtype, dtype=None):
    """A parameter of `module`, gathered for use and then cast.

    Args:
      module: the module that is being called.
      name: the key in the tree of parameters.
      initializer: as in `flax.linen.initializers`.
      shape: of the whole parameter.
      axes: a logical name, or None, for each axis of `shape`.
      param_dtype: the type in which the parameter is stored and gathered.
      dtype: the type in which it is used; `param_dtype` by default.
    """
    boxed = nn.with_logical_partitioning(initializer, axes)
    value = module.param(name, boxed, shape, jnp.dtype(param_dtype))
    return gathered(value, axes).astype(dtype or param_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(param: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """A stored parameter as it is used: all-gathered over `fsdp` once, for all its uses.

    Without this, XLA would gather at every use, after slices and casts, and again in each iteration
    of a loop. The gradient goes back the same way: reduce-scattered once.
    """
    return nn.with_logical_constraint(param, tuple(_IN_USE.get(axis, axis) for axis in axes))


def _gathered_forward(param, axes):
    return gathered(param, axes), None


def _gathered_backward(axes, _, gradient):
    return (nn.with_logical_constraint(gradient, axes),)


gathered.defvjp(_gathered_forward, _gathered_backward)


def current_batch_shards(num_rows: int) -> int:
    """Number of shards of the batch axis on the current mesh; 1 if `num_rows` is not divisible."""
    mesh, (axes,) = jax.sharding.get_abstract_mesh(), nn.logical_to_mesh_axes(("batch",))
    if mesh.empty or not axes:
        return 1
    shards = math.prod(mesh.shape[axis] for axis in axes)
    return shards if num_rows % shards == 0 else 1


def current_channel_shards() -> int:
    """Number of shards of the channels, D, on the current mesh."""
    mesh, (axis,) = jax.sharding.get_abstract_mesh(), nn.logical_to_mesh_axes(("channels",))
    return 1 if mesh.empty or axis is None else mesh.shape[axis]


def by_row_shard(tree: Any, num_shards: int) -> Any:
    """Arrays [B, ...] as [N, B / N, ...]: the first axis is the shard of the batch.

    A sum over rows is then taken within each shard, and devices exchange it once, at the end.
    """
    return jax.tree.map(lambda a: a.reshape(num_shards, -1, *a.shape[1:]), tree)


def split_positions(a_BSX, chunk: int) -> jax.Array:
    """[B, S, ...] as chunks of `chunk` positions, [n, B, K, ...]; the last is zero-padded."""
    B, S = a_BSX.shape[:2]
    pad = [(0, 0), (0, -S % chunk)] + [(0, 0)] * (a_BSX.ndim - 2)
    return jnp.pad(a_BSX, pad).reshape(B, -1, chunk, *a_BSX.shape[2:]).swapaxes(0, 1)


def join_positions(a_nBKX, num_positions: int) -> jax.Array:
    """The inverse of `split_positions`, without the padding: [B, `num_positions`, ...]."""
    n, B, K = a_nBKX.shape[:3]
    return a_nBKX.swapaxes(0, 1).reshape(B, n * K, *a_nBKX.shape[3:])[:, :num_positions]
