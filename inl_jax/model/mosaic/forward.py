"""One iteration of the integrator as one kernel: `dynamics.move`, then the next r and rms(e).

    o_k    = r_k Wo_k + bo_k                              wgmma, one controller after another
    v', x' = move(o, rms, x, v)                           in registers, float32
    r'     = relu(x' Wx + v' Wv + context)                wgmma into 64 x 256 float32 in registers
    rms'   = rms(x' - mu)

A program owns ROWS tokens and goes through D in chunks of COLUMNS. The controllers' outputs never
reach memory, and x, v, r and rms are read once and written once: what is written is the trajectory
that the gradient keeps. TMA loads the next chunk while this one is computed.

Shapes: N tokens, D width, C controller width, Q the four controllers, H = Q C, K = COLUMNS.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from inl_jax.model.dynamics import Dynamics
from inl_jax.model.mosaic.tiles import (
    COLUMNS,
    MATRIX,
    PER_COLUMN,
    PER_ROW,
    ROWS,
    WIDTH,
    Q,
    bytes_of,
    call,
    load,
    tiled,
    tiles,
    zeros,
)

H = Q * WIDTH
BF16, F32 = jnp.bfloat16, jnp.float32
OPERAND = COLUMNS * 2  # bytes: the swizzle of every operand of a product


class State(NamedTuple):
    """The state before an iteration, and what its controllers read."""

    x_ND: Any  # float32
    v_ND: Any  # float32; None for zero
    r_NH: Any  # bfloat16: the hidden activations of (x, v)
    rms_N: Any  # float32: rms(x - mu)


class Weights(NamedTuple):
    """What every iteration reads, except its excitation."""

    output_kernel_QCD: Any  # bfloat16
    state_kernel_EDH: Any  # bfloat16
    output_bias_QD: Any  # float32
    mu_D: Any  # float32
    context_NH: Any  # bfloat16


def iteration(state: State, weights: Weights, s_D, *, dynamics: Dynamics) -> State:
    """The state after one iteration.

    Args:
      state: N, a multiple of ROWS; D, a multiple of COLUMNS.
      weights: as `Weights` says.
      s_D: the excitation of this iteration, float32.
      dynamics: constants; its `dtype` is bfloat16.
    """
    N, D = state.x_ND.shape
    out = _state_of(N, D)
    inputs = [a for a in (*state, *weights, s_D) if a is not None]
    scratch = {
        "r_s": tiled((Q, ROWS, WIDTH), BF16, swizzle=OPERAND),
        "rms_s": plgpu.SMEM((ROWS,), F32),
        "new_s": tiled((2, ROWS, COLUMNS), F32),
        "operand_s": tiled((2, ROWS, COLUMNS), BF16),
        "barrier": plgpu.Barrier(num_arrivals=Q + 1),
        "context_barrier": plgpu.Barrier(num_arrivals=Q),
    }

    def body(*refs, **scratch):
        ins, outs = refs[: len(inputs)], refs[len(inputs) :]
        x, *v, r, rms, Wo, Ws, bo, mu, context, s = ins
        _body(State(x, v[0] if v else None, r, rms), Weights(Wo, Ws, bo, mu, context), s,
              State(*outs), dynamics=dynamics, **scratch)

    return State(*call(body, out=tuple(out), num_tokens=N, scratch=scratch)(*inputs))


def bytes_moved(N: int, D: int) -> int:
    """Bytes that one iteration of `N` tokens reads from global memory and writes to it, each once.

    Not counted: every program reads the weights again, from the L2 cache.
    """
    spec = jax.ShapeDtypeStruct
    weights = Weights(spec((Q, WIDTH, D), BF16), spec((2, D, H), BF16), spec((Q, D), F32),
                      spec((D,), F32), spec((N, H), BF16))
    return bytes_of((_state_of(N, D), weights, spec((D,), F32), _state_of(N, D)))


def _state_of(N: int, D: int) -> State:
    spec = jax.ShapeDtypeStruct
    return State(spec((N, D), F32), spec((N, D), F32), spec((N, H), BF16), spec((N,), F32))


def _body(state, weights, s_g, out, *, dynamics, r_s, rms_s, new_s, operand_s, barrier, context_barrier):
    dt, kappa, _ = dynamics
    D = state.x_ND.shape[1]
    program = lax.axis_index("program")
    rows = pl.ds(program * ROWS, ROWS)

    def copy_hidden(source_NH, barrier):
        for q in range(Q):
            hidden = source_NH.at[rows, pl.ds(q * WIDTH, WIDTH)]
            plgpu.copy_gmem_to_smem(hidden, r_s.at[q], barrier)

    copy_hidden(state.r_NH, barrier)
    plgpu.copy_gmem_to_smem(state.rms_N.at[rows], rms_s, barrier)
    plgpu.barrier_wait(barrier)
    far = None
    if not math.isinf(kappa):
        far = 1 - jnp.exp(-kappa * load(rms_s, PER_ROW))

    def refine(hidden_acc):
        def chunk(index, x_s, *rest):
            *v_s, Wo_s, Ws_s, bo_s, mu_s, s_s, sum_N = rest

            def per_column(ref):
                return lax.broadcast_in_dim(load(ref, PER_COLUMN), (ROWS, COLUMNS), (1,))

            def output(q):
                def product(acc):
                    plgpu.wgmma(acc, r_s.at[q], Wo_s.at[q])
                    return acc[...]

                o = pl.run_scoped(product, plgpu.ACC((ROWS, COLUMNS), F32))
                return o + per_column(bo_s.at[q])

            c = output(3)
            alpha = _sigmoid(output(0))
            if far is not None:
                alpha = alpha * lax.broadcast_in_dim(far, (ROWS, COLUMNS), (0,))
            v = c + alpha * (load(v_s[0], MATRIX) - c) if v_s else c - alpha * c
            beta = jnp.minimum(_softplus(output(1)), 2 / dt)
            x = load(x_s, MATRIX)
            mu = per_column(mu_s)
            v = v - beta * (x - mu) + per_column(s_s)
            x = x + dt * _sigmoid(output(2)) * v
            # The copies of the chunk before have read the buffer long ago.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            columns = pl.ds(index[0] * COLUMNS, COLUMNS)
            for i, new in enumerate((x, v)):
                new_s[i], operand_s[i] = new, new.astype(BF16)
            plgpu.commit_smem()
            for i in range(2):
                plgpu.copy_smem_to_gmem(new_s.at[i], out[i].at[rows, columns])
                plgpu.wgmma(hidden_acc, operand_s.at[i], Ws_s.at[i])
            plgpu.wgmma_wait(0)
            e = x - mu
            return sum_N + jnp.sum(e * e, axis=1)

        def block(shape, index, dtype):
            transforms = tiles(shape[-1], dtype, swizzle=OPERAND if dtype == BF16 else None)
            return plgpu.BlockSpec(shape, index, transforms=transforms)

        of_state = block((ROWS, COLUMNS), lambda j: (program, j), F32)
        per_channel = plgpu.BlockSpec((COLUMNS,), lambda j: (j,))
        in_specs = [
            *[of_state] * (1 if state.v_ND is None else 2),
            block((Q, WIDTH, COLUMNS), lambda j: (0, 0, j), BF16),
            block((2, COLUMNS, H), lambda j: (0, j, 0), BF16),
            plgpu.BlockSpec((Q, COLUMNS), lambda j: (0, j)),
            per_channel,
            per_channel,
        ]
        sum_N = plgpu.emit_pipeline(
            chunk,
            grid=(D // COLUMNS,),
            in_specs=in_specs,
            max_concurrent_steps=2,
            init_carry=zeros((ROWS,), PER_ROW),
        )(
            *[a for a in state[:2] if a is not None],
            weights.output_kernel_QCD, weights.state_kernel_EDH, weights.output_bias_QD,
            weights.mu_D, s_g,
        )
        return sum_N, hidden_acc[...]

    sum_N, hidden = pl.run_scoped(refine, plgpu.ACC((ROWS, H), F32))
    mean_N = sum_N / D + float(jnp.finfo(F32).tiny)
    rms_s[...] = mean_N * lax.rsqrt(mean_N)
    copy_hidden(weights.context_NH, context_barrier)
    plgpu.barrier_wait(context_barrier)
    for q in range(Q):
        part = hidden[:, q * WIDTH : (q + 1) * WIDTH]
        r_s[q] = jnp.maximum(part + load(r_s.at[q], MATRIX).astype(F32), 0).astype(BF16)
    plgpu.commit_smem()
    for q in range(Q):
        plgpu.copy_smem_to_gmem(r_s.at[q], out.r_NH.at[rows, pl.ds(q * WIDTH, WIDTH)])
    plgpu.copy_smem_to_gmem(rms_s, out.rms_N.at[rows])
    plgpu.wait_smem_to_gmem(0)


def _sigmoid(o):
    return 1 / (1 + jnp.exp(-o))


def _softplus(o):
    return jnp.maximum(o, 0) + jnp.log(1 + jnp.exp(-jnp.abs(o)))
