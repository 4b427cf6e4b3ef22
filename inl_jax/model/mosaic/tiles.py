"""What the integrator's kernels are made of: tiles in shared memory, loads, how a kernel is called.

A program, one warpgroup of 128 threads, owns ROWS tokens and goes through the width D in chunks.
Matrix products are wgmma instructions, copies between global and shared memory are TMA.

The tests interpret the kernels on a CPU: see `interpreted`.
"""

import contextlib
import contextvars
import functools
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P

from inl_jax.internals import gpu_interpreter
from inl_jax.model.dynamics import CONTROLLERS

ROWS = 64  # tokens of a program: wgmma multiplies 64 rows
WIDTH = 64  # C, the width of a controller that the kernels are made for
Q = len(CONTROLLERS)
H = Q * WIDTH
BF16, F32 = jnp.bfloat16, jnp.float32

MATRIX = plgpu.Layout.WGMMA  # [ROWS, .] over the threads, as an accumulator of wgmma has it
PER_ROW = plgpu.Layout.WGMMA.reduce(1)  # [ROWS]
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)  # [.]

ZERO = plgpu.SMEM((1,), jnp.int32)  # for `write_zero`


class _Interpreter(NamedTuple):
    params: Any
    on_host: bool


_interpreter: contextvars.ContextVar[_Interpreter | None] = contextvars.ContextVar(
    "interpreter", default=None
)
_one_on_host = threading.Lock()


@contextlib.contextmanager
def interpreted(*, on_host: bool = False) -> Iterator[None]:
    """Kernels that are traced inside are interpreted on a CPU. For tests: it is very slow.

    Args:
      on_host: each kernel is a call to the host, which JAX can recompute and run on each device.
        Such a call holds a thread of XLA and needs another: set NPROC, how many XLA starts, to more
        than there are devices, or they wait for each other forever.
    """
    token = _interpreter.set(_Interpreter(gpu_interpreter(), on_host))
    try:
        yield
    finally:
        _interpreter.reset(token)


def call(body: Callable, *, out: Any, num_tokens: int, scratch: dict[str, Any]) -> Callable:
    """A kernel of one program for each ROWS of `num_tokens`, as a function of its inputs.

    Args:
      body: takes references to the inputs and the outputs in global memory, and then to `scratch`
        by name. `jax.lax.axis_index("program")` inside it says which ROWS tokens are its own.
      out: the outputs' shapes and types.
      num_tokens: N, a multiple of ROWS.
      scratch: buffers in shared memory and barriers.
    """
    interpreter = _interpreter.get()
    kernel = plgpu.kernel(
        body,
        out_type=out,
        grid=(num_tokens // ROWS,),
        grid_names=("program",),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpreter and interpreter.params,
    )
    if interpreter and interpreter.on_host:
        kernel = _on_host(kernel, out)
    return _by_row_shard(kernel)


def _on_host(kernel: Callable, out: Any) -> Callable:
    """`kernel` as a call to the host, one at a time: the interpreter has one memory for all."""
    run = jax.jit(kernel)

    def interpret(*arrays):
        with _one_on_host, interpreted():
            return jax.block_until_ready(run(*arrays))

    return functools.partial(jax.pure_callback, interpret, out)


def _by_row_shard(kernel: Callable) -> Callable:
    """`kernel`, under `vmap` over the shards of the batch: each device calls it with its own.

    The integrator splits rows so (`integrator.integrate`), and XLA cannot split a kernel itself.
    """
    batched = jax.custom_batching.custom_vmap(kernel)

    @batched.def_vmap
    def _(_, in_batched, *arrays):
        spec = nn.logical_to_mesh_axes(("batch",))

        def on_one_device(*arrays):
            own = [a[0] if is_split else a for a, is_split in zip(arrays, in_batched, strict=True)]
            return jax.tree.map(lambda a: a[None], kernel(*own))

        specs = tuple(spec if is_split else P() for is_split in in_batched)
        out = jax.shard_map(on_one_device, in_specs=specs, out_specs=spec, check_vma=False)(*arrays)
        return out, jax.tree.map(lambda _: True, out)

    return batched


def tiled(shape: tuple[int, ...], dtype: Any, *, swizzle: int | None = None) -> Any:
    """Shared memory for matrices [..., rows, columns] in tiles, as `tiles` makes them."""
    return plgpu.SMEM(shape, dtype, transforms=tiles(shape[-1], dtype, swizzle=swizzle))


def tiles(columns: int, dtype: Any, *, swizzle: int | None = None) -> tuple[Any, ...]:
    """Splits a matrix in shared memory into tiles of 8 rows, as TMA and wgmma address it.

    Args:
      columns: of the matrix.
      dtype: of its values.
      swizzle: bytes of a row of a tile; by default a whole row, at most 128. The two operands of a
        wgmma must have the same.
    """
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = swizzle or min(128, columns * itemsize)
    return plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)


def load(ref: Any, layout: Any) -> jax.Array:
    """All values of `ref`, in registers, spread over the threads as `layout` says."""
    if _interpreter.get():  # it has no threads, and in jax 0.10 no load with a layout
        return ref[...]
    if jax.__version_info__ < (0, 11):
        return plgpu.load(ref, (), layout=layout)
    return plgpu.load(ref, layout=layout)


def zeros(shape: tuple[int, ...], layout: Any) -> jax.Array:
    """Zeros in float32, in registers, spread over the threads as `layout` says."""
    array = jnp.zeros(shape, jnp.float32)
    return array if _interpreter.get() else plgpu.layout_cast(array, layout)


def write_zero(zero_s: Any) -> None:
    """Writes the zero that each chunk reads and adds to the indices of buffers that stay the same.

    The compiler cannot see that it is 0. Otherwise it computes the addresses of all buffers before
    the loop over chunks, and spills registers.
    """
    zero_s[0] = jnp.int32(0)
    plgpu.commit_smem()


def sigmoid(o: jax.Array) -> jax.Array:
    """`jax.nn.sigmoid`, of operations that Mosaic has."""
    return 1 / (1 + jnp.exp(-o))


def bytes_of(specs: Any) -> int:
    """Bytes of a tree of arrays or of their shapes and types."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(specs))
