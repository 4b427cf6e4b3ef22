"""One iteration of the integrator as one kernel: `dynamics.move`, then the next r and rms(e).

    o_k    = r_k Wo_k + bo_k                              wgmma
    v', x' = move(o, rms, x, v)                           in registers, float32
    r'     = relu(x' Wx + v' Wv + context)                wgmma into 64 x 256 float32 in registers
    rms'   = rms(x' - mu)

A program owns ROWS tokens and goes through D in chunks of COLUMNS. The controllers' outputs never
reach memory, and x, v, r and rms are read once and written once: what is written is the trajectory
that the gradient keeps. TMA loads the next chunk while this one is computed.

Of the 255 registers that a thread can have, r' takes 128: the order of the lines in `chunk` is one
in which few other values live at a time.

Shapes: N tokens, D width, C controller width, Q the four controllers, H = Q C, K = COLUMNS.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from inl_jax.model.dynamics import Dynamics, softplus
from inl_jax.model.mosaic.tiles import (
    BF16,
    F32,
    MATRIX,
    PER_COLUMN,
    PER_ROW,
    ROWS,
    WIDTH,
    ZERO,
    H,
    Q,
    bytes_of,
    call,
    load,
    sigmoid,
    tiled,
    write_zero,
    zeros,
)

COLUMNS = 32  # of a chunk: with 64, the accumulators do not fit into 255 registers a thread
SLOTS = 2  # chunks in shared memory: one that is computed, one that is loaded
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
    arrays, structure = jax.tree.flatten((state, weights, s_D))
    out, *_ = specs(N, D)
    num_copies = len(arrays) - 3
    scratch = {
        "r_s": tiled((Q, ROWS, WIDTH), BF16, swizzle=OPERAND),
        "rms_s": plgpu.SMEM((ROWS,), F32),
        "zero_s": ZERO,
        "xv_s": tiled((SLOTS, 2, ROWS, COLUMNS), F32),
        "Wo_s": tiled((SLOTS, Q, WIDTH, COLUMNS), BF16),
        "Ws_s": tiled((SLOTS, 2, COLUMNS, H), BF16, swizzle=OPERAND),
        "vectors_s": plgpu.SMEM((SLOTS, Q + 2, COLUMNS), F32),
        "new_s": tiled((2, ROWS, COLUMNS), F32),
        "operands_s": tiled((2, ROWS, COLUMNS), BF16),
        "hidden_ready": plgpu.Barrier(num_arrivals=Q + 1),
        "context_ready": plgpu.Barrier(num_arrivals=Q),
        "chunk_ready": plgpu.Barrier(num_arrivals=num_copies, num_barriers=SLOTS),
    }

    def body(*refs, **scratch):
        read = jax.tree.unflatten(structure, refs[: len(arrays)])
        _body(*read, State(*refs[len(arrays) :]), dynamics=dynamics, **scratch)

    return State(*call(body, out=tuple(out), num_tokens=N, scratch=scratch)(*arrays))


def specs(N: int, D: int) -> tuple[State, Weights, Any]:
    """Shapes and types of what `iteration` takes; the state is also what it returns."""
    spec = jax.ShapeDtypeStruct
    state = State(spec((N, D), F32), spec((N, D), F32), spec((N, H), BF16), spec((N,), F32))
    weights = Weights(
        output_kernel_QCD=spec((Q, WIDTH, D), BF16),
        state_kernel_EDH=spec((2, D, H), BF16),
        output_bias_QD=spec((Q, D), F32),
        mu_D=spec((D,), F32),
        context_NH=spec((N, H), BF16),
    )
    return state, weights, spec((D,), F32)


def bytes_moved(N: int, D: int) -> int:
    """Bytes that one iteration of `N` tokens reads from global memory and writes, each once."""
    inputs = specs(N, D)
    return bytes_of((inputs, inputs[0]))


def bytes_read_again(N: int, D: int) -> int:
    """Bytes of weights that all programs but the first read again, from the L2 cache."""
    _, weights, s_D = specs(N, D)
    return (N // ROWS - 1) * bytes_of((weights._replace(context_NH=None), s_D))


def _body(
    state,
    weights,
    s_g,
    out,
    *,
    dynamics,
    r_s,
    rms_s,
    zero_s,
    xv_s,
    Wo_s,
    Ws_s,
    vectors_s,
    new_s,
    operands_s,
    hidden_ready,
    context_ready,
    chunk_ready,
):
    dt, kappa, _ = dynamics
    D = state.x_ND.shape[1]
    rows = pl.ds(lax.axis_index("program") * ROWS, ROWS)
    xv_g = [a for a in (state.x_ND, state.v_ND) if a is not None]

    def fetch_hidden(source_NH, barrier):
        for q in range(Q):
            hidden = source_NH.at[rows, pl.ds(q * WIDTH, WIDTH)]
            plgpu.copy_gmem_to_smem(hidden, r_s.at[q], barrier)

    def fetch(j):
        slot, columns = lax.rem(j, SLOTS), pl.ds(j * COLUMNS, COLUMNS)
        copies = [(a.at[rows, columns], xv_s.at[slot, i]) for i, a in enumerate(xv_g)]
        copies += [
            (weights.output_kernel_QCD.at[:, :, columns], Wo_s.at[slot]),
            (weights.state_kernel_EDH.at[:, columns], Ws_s.at[slot]),
            (weights.output_bias_QD.at[:, columns], vectors_s.at[slot, pl.ds(0, Q)]),
            (weights.mu_D.at[columns], vectors_s.at[slot, Q]),
            (s_g.at[columns], vectors_s.at[slot, Q + 1]),
        ]
        for source, target in copies:
            plgpu.copy_gmem_to_smem(source, target, chunk_ready.at[slot])

    fetch_hidden(state.r_NH, hidden_ready)
    plgpu.copy_gmem_to_smem(state.rms_N.at[rows], rms_s, hidden_ready)
    for j in range(min(SLOTS, D // COLUMNS)):
        fetch(jnp.int32(j))
    plgpu.barrier_wait(hidden_ready)
    write_zero(zero_s)
    far_N = None
    if not math.isinf(kappa):
        far_N = 1 - jnp.exp(-kappa * load(rms_s, PER_ROW))

    def all_chunks(hidden_acc):
        def chunk(j, sum_N):
            slot, columns = lax.rem(j, SLOTS), pl.ds(j * COLUMNS, COLUMNS)
            zero = zero_s[0]

            def per_channel(i):
                a_K = load(vectors_s.at[slot, i], PER_COLUMN)
                return lax.broadcast_in_dim(a_K, (ROWS, COLUMNS), (1,))

            def outputs(*accs):
                for q in range(Q):
                    plgpu.wgmma(accs[q], r_s.at[q + zero], Wo_s.at[slot, q])
                return [acc[...] for acc in accs]

            plgpu.barrier_wait(chunk_ready.at[slot])
            o = pl.run_scoped(outputs, *[plgpu.ACC((ROWS, COLUMNS), F32)] * Q)
            c = o[3] + per_channel(3)
            alpha = sigmoid(o[0] + per_channel(0))
            if far_N is not None:
                alpha = alpha * lax.broadcast_in_dim(far_N, (ROWS, COLUMNS), (0,))
            if state.v_ND is None:
                v = c - alpha * c
            else:
                v = c + alpha * (load(xv_s.at[slot, 1], MATRIX) - c)
            beta = jnp.minimum(softplus(o[1] + per_channel(1)), 2 / dt)
            x = load(xv_s.at[slot, 0], MATRIX)
            v = v - beta * (x - per_channel(Q)) + per_channel(Q + 1)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the chunk before
            new_s[1 + zero], operands_s[1 + zero] = v, v.astype(BF16)
            x = x + dt * sigmoid(o[2] + per_channel(2)) * v
            new_s[zero], operands_s[zero] = x, x.astype(BF16)
            plgpu.commit_smem()
            for i, new_g in enumerate((out.x_ND, out.v_ND)):
                plgpu.copy_smem_to_gmem(new_s.at[i + zero], new_g.at[rows, columns])
                plgpu.wgmma(hidden_acc, operands_s.at[i + zero], Ws_s.at[slot, i])
            plgpu.wgmma_wait(0)
            e = x - per_channel(Q)
            sum_N = sum_N + jnp.sum(e * e, axis=1)
            lax.cond(j + SLOTS < D // COLUMNS, lambda: fetch(j + SLOTS), lambda: None)
            return sum_N

        sum_N = lax.fori_loop(0, D // COLUMNS, chunk, zeros((ROWS,), PER_ROW))
        mean_N = sum_N / D + float(jnp.finfo(F32).tiny)
        rms_s[...] = mean_N * lax.rsqrt(mean_N)
        return hidden_acc[...]

    hidden = pl.run_scoped(all_chunks, plgpu.ACC((ROWS, H), F32))
    fetch_hidden(weights.context_NH, context_ready)
    plgpu.barrier_wait(context_ready)
    for q in range(Q):
        sum_NC = hidden[:, q * WIDTH : (q + 1) * WIDTH] + load(r_s.at[q], MATRIX).astype(F32)
        r_s[q] = jnp.maximum(sum_NC, 0).astype(BF16)
    plgpu.commit_smem()
    for q in range(Q):
        plgpu.copy_smem_to_gmem(r_s.at[q], out.r_NH.at[rows, pl.ds(q * WIDTH, WIDTH)])
    plgpu.copy_smem_to_gmem(rms_s, out.rms_N.at[rows])
    plgpu.wait_smem_to_gmem(0)
