"""The integrator neuron layer: its parameters, and how its iterations are run.

The equations are in `dynamics.py`. This file decides in which types they are computed, how many
positions go through them at a time, what the backward pass keeps, and how devices share the work.

Shapes: B batch, S sequence, D width, C controller width, Q the four controllers, T iterations.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from inl_jax.config import ModelConfig
from inl_jax.model.dynamics import (
    CONTROLLERS,
    Dynamics,
    complete,
    excitation,
    hidden_from_context,
    run,
    run_until,
)
from inl_jax.model.dynamics_vjp import Loop, run_lean
from inl_jax.model.layers import at_least_float32
from inl_jax.model.mosaic.run_mosaic import integrator_kernel, run_mosaic
from inl_jax.model.params import (
    by_row_shard,
    current_batch_shards,
    declare,
    join_positions,
    split_positions,
)
from inl_jax.model.platform.unroll import unrolled


def integrate(
    params,
    h_BSD,
    x_BSD,
    *,
    amplitude,
    num_iterations: int,
    dynamics: Dynamics,
    kernel: str = "xla",
    gradient: str = "lean",
    segment: int = 1,
    chunk: int = 0,
    remat: bool = False,
    prevent_cse: bool = False,
    trajectory_dtype: Any = None,
    unroll: bool = False,
) -> jax.Array:
    """The state after `num_iterations` steps from the state `x` and velocity 0, [B, S, D].

    Args:
      params: as declared by `Integrator`, in any float type.
      h_BSD: the context, the same in every iteration.
      x_BSD: the initial state.
      amplitude: the excitation's A, a number or a traced scalar.
      num_iterations: T.
      dynamics: constants of a step. Products are computed in `dynamics.dtype`. The state is kept
        in float32 (float64 if `x` is): in bfloat16 it would stop moving, 1 + 0.1 * 0.03 == 1.
      kernel: "xla", or "mosaic" (`mosaic.run_mosaic`), which has a gradient of its own.
      gradient: "lean" (`dynamics_vjp`), or "autodiff" of the plain scan, for comparison.
      segment: iterations between the states that "lean" keeps.
      chunk: positions that go through all iterations together; 0 takes the whole sequence.
      remat: keep only `h` and `x`, and recompute the iterations in the backward pass.
      prevent_cse: recompute them only when their gradient is due (`jax.checkpoint`): for blocks
        that share the body of a loop.
      trajectory_dtype: the type in which "lean" keeps those states; None: the state's.
      unroll: compile the iterations as straight code, not as a loop.
    """
    arrays_of = _arrays(params, x_BSD, amplitude, num_iterations, dynamics)
    loop = Loop(segment, trajectory_dtype, unroll)

    def refine(hx):
        if kernel == "mosaic":
            return run_mosaic(*arrays_of(hx), dynamics)
        if gradient == "autodiff":
            return run(*arrays_of(hx), dynamics=dynamics, unroll=unroll)
        return run_lean(*arrays_of(hx), dynamics, loop)

    if remat:
        refine = jax.checkpoint(refine, prevent_cse=prevent_cse)
    refine_in_chunks = functools.partial(_in_chunks, refine, chunk=chunk)
    N = current_batch_shards(len(x_BSD))
    if N == 1:
        return refine_in_chunks(_by_channels((h_BSD, x_BSD), ("batch",)))
    # The parameters' gradients add up within each part of the rows, and over the parts at the end.
    # Otherwise devices would exchange them in every iteration.
    parts = _by_channels(by_row_shard((h_BSD, x_BSD), N), ("batch", None))
    return jax.vmap(refine_in_chunks)(parts).reshape(x_BSD.shape)


def integrate_until(
    params,
    h_BSD,
    x_BSD,
    *,
    amplitude,
    num_iterations: int,
    dynamics: Dynamics,
    tol: float,
    chunk: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """`integrate`, in which a token stops after its first step with rms below `tol`.

    The other arguments are those of `integrate`. There is no gradient.

    Returns:
      The last states [B, S, D]; and how many steps each token took, int32 [B, S].
    """
    arrays_of = _arrays(params, x_BSD, amplitude, num_iterations, dynamics)

    def refine(hx):
        return run_until(*arrays_of(hx), dynamics=dynamics, tol=tol)

    return _in_chunks(refine, _by_channels((h_BSD, x_BSD), ("batch",)), chunk=chunk)


def _arrays(params, x_BSD, amplitude, num_iterations: int, dynamics: Dynamics) -> Callable:
    """A function from (h, x), of all positions or of some, to the arrays that `run` takes."""
    state_dtype = at_least_float32(x_BSD)
    # Cast before the loops, so that gradients add up over iterations and chunks in this type.
    params = complete(jax.tree.map(lambda p: p.astype(state_dtype), params))
    s_TD = excitation(
        params["gamma"], params["phi"], amplitude=amplitude, num_iterations=num_iterations
    )
    in_step = {n: params[n] for n in ("mu", "state_kernel", "output_kernel", "output_bias")}

    def arrays_of(hx):
        h_BSD, x_BSD = hx
        from_context_BSQC = hidden_from_context(params, h_BSD, dtype=dynamics.dtype)
        return in_step, from_context_BSQC, x_BSD.astype(state_dtype), s_TD

    return arrays_of


def _in_chunks(refine: Callable, hx, *, chunk: int):
    """`refine((h, x))`, with `chunk` positions at a time; 0 takes all."""
    S = hx[0].shape[1]
    if chunk == 0 or chunk >= S:
        return refine(hx)
    refined = jax.lax.map(refine, jax.tree.map(lambda a: split_positions(a, chunk), hx))
    return jax.tree.map(lambda a: join_positions(a, S), refined)


def _by_channels(tree, rows):
    """Constrains arrays [..., S, D] to be sharded along D over the tensor axis."""
    axes = (*rows, "sequence", "channels")
    return jax.tree.map(lambda a: nn.with_logical_constraint(a, axes), tree)


class Integrator(nn.Module):
    """Declares the parameters of `integrate`."""

    config: ModelConfig

    @nn.compact
    def __call__(self, h_BSD, x_BSD, *, amplitude, dtype, decoding: bool = False) -> jax.Array:
        """The last state, from the context `h` and the initial state `x`; products in `dtype`.

        Decoding takes no kernels: it has few tokens, and runs on other machines than the training.
        """
        c = self.config
        D, C, Q = c.d_model, c.controller_width, len(CONTROLLERS)
        init = nn.initializers
        hidden_init = init.normal((3 * D) ** -0.5)  # lecun-normal: every unit reads (h, x, v)
        declared = {
            "mu": (init.zeros, (D,), ("channels",)),
            "gamma": (lambda *a: 1 + init.normal(0.1)(*a), (D,), ("channels",)),
            "phi": (init.uniform(2 * math.pi), (D,), ("channels",)),
            "context_kernel": (hidden_init, (D, Q, C), ("state", None, None)),
            "state_kernel": (hidden_init, (2, D, Q, C), (None, "state", None, None)),
            "hidden_bias": (init.zeros, (Q, C), (None, None)),
            "output_kernel": (init.normal(0.01), (Q, C, D), (None, None, "state")),
            "output_bias": (_output_bias_init(c), (Q, D), (None, "channels")),
        }
        params = {
            name: declare(self, name, *declaration, param_dtype=c.param_dtype)
            for name, declaration in declared.items()
            if 0 not in declaration[1]  # its shape: see `complete`
        }
        self.sow("intermediates", "inputs", (h_BSD, x_BSD))  # kept only if the caller asks for it
        settings = {
            "amplitude": amplitude,
            "num_iterations": c.num_iterations,
            "dynamics": Dynamics(c.dt, c.kappa, dtype),
            "chunk": c.integrator_chunk,
        }
        if c.tol > 0:
            last_BSD, steps_BS = integrate_until(params, h_BSD, x_BSD, tol=c.tol, **settings)
            self.sow("steps", "taken", steps_BS)  # kept only if the caller asks for it
            return last_BSD
        return integrate(
            params,
            h_BSD,
            x_BSD,
            kernel="xla" if decoding else integrator_kernel(c),
            gradient=c.integrator_gradient,
            segment=c.integrator_segment,
            remat=c.remat == "integrator",
            prevent_cse=len(c.mixers) > 1,
            trajectory_dtype=jnp.bfloat16 if c.trajectory_dtype == "bfloat16" else None,
            unroll=unrolled(c),
            **settings,
        )


def _output_bias_init(config: ModelConfig):
    """Biases that make alpha0 = 0.8, beta = initial_beta, gate = 0.5 and c = 0 at the start."""
    start = (math.log(0.8 / 0.2), math.log(math.expm1(config.initial_beta)), 0.0, 0.0)
    return lambda key, shape, dtype: jnp.broadcast_to(jnp.array(start, dtype)[:, None], shape)
