"""The gradient of one iteration of the integrator as one kernel, and of all T iterations.

The gradient by (x, v) before iteration t is complete only after the products with Wx and Wv, which
need dr of the whole width D. So the kernel of iteration t first completes what the kernel of t + 1
left open, and leaves its own to the kernel of t - 1: dx and dv are read once and written once.

    o, v', x'      forward once more, from r on                          (`dynamics.move`)
    dx += dr_after Wx^T + pull_after (x' - mu),   dv += dr_after Wv^T    of iteration t + 1
    dv += dt gate dx,   do by controller,   dx -= dv beta,   dv *= alpha (`dynamics_vjp`)
    dr = sum_D do Wo^T where r > 0                                       wgmma, in registers
    pull = d_rms / (D rms): the gradient by rms(e) is pull e

What sums over tokens is left to XLA: the products of dWo, dWx and dWv; the gradient by the biases,
which columns of ones beside r add to the product of dWo; and that by the excitation, of which every
program writes its part. That by mu telescopes: the sum over t of -de is dx_T - dx_0 plus the
product of Wx^T with the sum over t of dr.

Shapes: N tokens, D width, C controller width, Q the four controllers, H = Q C, T iterations, P
programs of ROWS tokens, E the two inputs (x, v) of `state_kernel`.
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
    tiles,
    write_zero,
    zeros,
)

COLUMNS = 16  # of a chunk: with 32, dr and what becomes of a chunk need more than 255 registers
OPERAND = COLUMNS * 2  # bytes: the swizzle of every operand of a product
ONES = 16  # columns of ones beside r: a product is not made faster by fewer


class After(NamedTuple):
    """The gradient by the state after an iteration, and what the iteration that follows left open.

    `dx` lacks `dr Wx^T + pull (x - mu)`, `dv` lacks `dr Wv^T`. None is zero.
    """

    dx_ND: Any  # float32
    dv_ND: Any = None  # float32
    dr_NH: Any = None  # bfloat16: the gradient by the input of relu
    pull_N: Any = None  # float32


class Weights(NamedTuple):
    """What every iteration reads. Each product has its operand in the order it reads it."""

    output_QCD: Any  # bfloat16
    output_QDC: Any  # bfloat16, the same again
    state_HCD: Any  # bfloat16 [E Q, C, D]
    vectors_VD: Any  # float32 [6, D]: four output biases, mu, and the excitation of this iteration


def backward(params, s_TD, kept, dx_ND, *, dynamics: Dynamics):
    """The gradient of T iterations of `forward.iteration`.

    Args:
      params: as `dynamics.run` takes them, in float32.
      s_TD: the excitation, float32.
      kept: (x, v, r, rms) before each iteration, first to last: x and v float32 [N, D], r bfloat16
        [N, H], rms float32 [N]. v is None for zero, which only the first can be. N is a multiple of
        ROWS.
      dx_ND: the gradient by the state after the last iteration, float32. A token whose row is zero
        adds nothing to any gradient.
      dynamics: constants; its `dtype` is bfloat16.

    Returns:
      The gradients by `params`, float32; by what the context adds to the input of relu, bfloat16
      [N, H]; by the state before the first iteration, float32 [N, D]; and by `s`, float32 [T, D].
    """
    T, D = s_TD.shape
    Wo_QCD = params["output_kernel"].astype(BF16)
    Ws_EHD = params["state_kernel"].astype(BF16).reshape(2, D, H).transpose(0, 2, 1)
    after = After(dx_ND)
    dWo = dWx = dWv = 0
    all_dr, ds = [], []
    for t in reversed(range(T)):
        vectors_VD = jnp.stack([*params["output_bias"], params["mu"], s_TD[t]])
        weights = Weights(
            Wo_QCD, Wo_QCD.transpose(0, 2, 1), Ws_EHD.reshape(2 * Q, WIDTH, D), vectors_VD
        )
        after, do_QND, ds_PD = iteration_backward(kept[t], after, weights, dynamics=dynamics)
        x_ND, v_ND, r_NH, _ = kept[t]
        r_NQC = r_NH.reshape(-1, Q, WIDTH)
        ones = jnp.ones((*r_NQC.shape[:2], ONES), BF16)
        with_ones = jnp.concatenate([r_NQC, ones], axis=-1)
        # These products read float32, which a GPU multiplies as TF32: to round x and v to bfloat16
        # XLA would read and write them once more, in a kernel of its own.
        wide_dr_NH = after.dr_NH.astype(F32)
        dWo += _product("nqc,qnd->qcd", with_ones, do_QND)
        dWx += _product("nh,nd->hd", wide_dr_NH, x_ND)
        if v_ND is not None:
            dWv += _product("nh,nd->hd", wide_dr_NH, v_ND)
        all_dr.append(after.dr_NH)
        ds.append(ds_PD.sum(0))
    d_context_NH = sum(dr.astype(F32) for dr in all_dr)
    mu, Wx_HD = params["mu"], Ws_EHD[0]
    first_dx_ND = after.dx_ND + _product("nh,hd->nd", after.dr_NH, Wx_HD)
    if after.pull_N is not None:
        first_dx_ND += after.pull_N[:, None] * (kept[0][0] - mu)
    through_Wx_D = d_context_NH.sum(0) @ Wx_HD.astype(F32)
    d_state_EHD = jnp.stack([dWx, jnp.broadcast_to(dWv, (H, D))])
    d_params = {
        "mu": (dx_ND - first_dx_ND).sum(0) + through_Wx_D,
        "state_kernel": d_state_EHD.transpose(0, 2, 1).reshape(2, D, Q, WIDTH),
        "output_kernel": dWo[:, :WIDTH],
        "output_bias": dWo[:, WIDTH],
    }
    return d_params, d_context_NH.astype(BF16), first_dx_ND, jnp.stack(ds[::-1])


def _product(subscripts: str, *operands):
    return jnp.einsum(subscripts, *operands, preferred_element_type=F32)


def iteration_backward(state, after: After, weights: Weights, *, dynamics: Dynamics):
    """The gradient of one iteration, but for the sums over tokens.

    Args:
      state: (x, v, r, rms) before the iteration, as in `backward`.
      after: the gradient by the state after it.
      weights: as `Weights` says.
      dynamics: constants; its `dtype` is bfloat16.

    Returns:
      The gradient by the state before it, `After` for the iteration before; the gradient by the
      controllers' outputs, bfloat16 [Q, N, D]; and by the excitation, float32 [P, D], to be summed.
    """
    inputs = _inputs(state, after, weights, dynamics.kappa)
    outputs = _outputs(inputs)
    near = "rms" in inputs

    def body(*refs, **scratch):
        refs = dict(zip([*inputs, *outputs], refs, strict=True))
        _body(refs, dynamics=dynamics, **scratch)

    scratch = {
        "r_s": tiled((Q, ROWS, WIDTH), BF16, swizzle=OPERAND),
        "dr_after_s": tiled((Q, ROWS, WIDTH), BF16, swizzle=OPERAND),
        "row_s": plgpu.SMEM((2, ROWS), F32),
        "zero_s": ZERO,
        "do_s": tiled((Q, ROWS, COLUMNS), BF16),
        "new_s": tiled((2, ROWS, COLUMNS), F32),
        "ds_s": plgpu.SMEM((1, COLUMNS), F32),
        "barrier": plgpu.Barrier(
            num_arrivals=Q * (1 + ("dr_after" in inputs)) + near + ("pull_after" in inputs)
        ),
    }
    N = inputs["x"].shape[0]
    arrays = call(body, out=tuple(outputs.values()), num_tokens=N, scratch=scratch)(
        *inputs.values()
    )
    found = dict(zip(outputs, arrays, strict=True))
    before = After(found["new_dx"], found.get("new_dv"), found["dr"], found.get("pull"))
    return before, found["do"], found["ds"]


def bytes_moved(N: int, D: int) -> int:
    """Bytes that one iteration of `N` tokens reads from global memory and writes, each once."""
    spec = jax.ShapeDtypeStruct
    wide, hidden, scalar = spec((N, D), F32), spec((N, H), BF16), spec((N,), F32)
    state, after = (wide, wide, hidden, scalar), After(wide, wide, hidden, scalar)
    inputs = _inputs(state, after, _weights(D), kappa=1.0)
    return bytes_of((inputs, _outputs(inputs)))


def bytes_read_again(N: int, D: int) -> int:
    """Bytes of weights that all programs but the first read again, from the L2 cache."""
    return (N // ROWS - 1) * bytes_of(_weights(D))


def _weights(D: int) -> Weights:
    """Shapes and types of the weights."""
    spec = jax.ShapeDtypeStruct
    output, state = spec((Q, WIDTH, D), BF16), spec((2 * Q, WIDTH, D), BF16)
    return Weights(output, spec((Q, D, WIDTH), BF16), state, spec((6, D), F32))


def _inputs(state, after: After, weights: Weights, kappa: float) -> dict[str, Any]:
    """The arrays that the kernel reads, by the name it has for them."""
    x, v, r, rms = state
    named = {
        "x": x,
        "v": v,
        "r": r,
        "rms": None if math.isinf(kappa) else rms,
        "dx": after.dx_ND,
        "dv": after.dv_ND,
        "dr_after": after.dr_NH,
        "pull_after": after.pull_N,
        "Wo": weights.output_QCD,
        "Wo_transposed": weights.output_QDC,
        "Ws": weights.state_HCD,
        "vectors": weights.vectors_VD,
    }
    return {name: array for name, array in named.items() if array is not None}


def _outputs(inputs: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """What the kernel writes for these inputs."""
    N, D = inputs["x"].shape
    shapes = {
        "new_dx": ((N, D), F32),
        "new_dv": ((N, D), F32),
        "dr": ((N, H), BF16),
        "pull": ((N,), F32),
        "do": ((Q, N, D), BF16),
        "ds": ((N // ROWS, D), F32),
    }
    unused = {"v": "new_dv", "rms": "pull"}  # a constant has no gradient
    absent = [output for needs, output in unused.items() if needs not in inputs]
    return {
        name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items() if name not in absent
    }


def _body(refs, *, dynamics: Dynamics, r_s, dr_after_s, row_s, zero_s, do_s, new_s, ds_s, barrier):
    dt, kappa, _ = dynamics
    D = refs["x"].shape[1]
    program = lax.axis_index("program")
    rows = pl.ds(program * ROWS, ROWS)
    per_token = {"rms": row_s.at[0], "pull_after": row_s.at[1]}
    for name, buffer in {"r": r_s, "dr_after": dr_after_s}.items():
        for q in range(Q if name in refs else 0):
            hidden = refs[name].at[rows, pl.ds(q * WIDTH, WIDTH)]
            plgpu.copy_gmem_to_smem(hidden, buffer.at[q], barrier)
    for name, buffer in per_token.items():
        if name in refs:
            plgpu.copy_gmem_to_smem(refs[name].at[rows], buffer, barrier)
    plgpu.barrier_wait(barrier)

    def of_row(name):
        return load(per_token[name], PER_ROW)

    def spread(per_row):
        return lax.broadcast_in_dim(per_row, (ROWS, COLUMNS), (0,))

    write_zero(zero_s)

    def chunk(index, *buffers, dr_accs):
        *buffers, sum_N = buffers
        zero = zero_s[0]
        s = dict(zip(streamed, buffers, strict=True))

        def of_column(i):
            return lax.broadcast_in_dim(load(s["vectors"].at[i], PER_COLUMN), (ROWS, COLUMNS), (1,))

        def output(q):
            return _product_of([(r_s.at[q + zero], s["Wo"].at[q])]) + of_column(q)

        def left_open(i):
            pairs = [(dr_after_s.at[q + zero], s["Ws"].at[i * Q + q]) for q in range(Q)]
            return _product_of(pairs) if "dr_after" in refs else 0

        # The copies of the chunk before have read the buffers long ago.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        # In an order in which few values are needed at a time: each takes 8 registers, dr 128.
        c, alpha0 = output(3), sigmoid(output(0))
        far = spread(1 - jnp.exp(-kappa * of_row("rms"))) if "rms" in refs else 1
        past = load(s["v"], MATRIX) - c if "v" in s else -c
        new_v = c + alpha0 * far * past
        o_beta = output(1)
        beta = jnp.minimum(softplus(o_beta), 2 / dt)
        slope = sigmoid(o_beta)
        e = load(s["x"], MATRIX) - of_column(4)
        new_v = new_v - beta * e + of_column(5)
        gate = sigmoid(output(2))
        dx = load(s["dx"], MATRIX) + left_open(0)
        if "pull_after" in refs:
            dx = dx + spread(of_row("pull_after")) * (e + dt * gate * new_v)
        do_s[2 + zero] = (dt * dx * new_v * gate * (1 - gate)).astype(BF16)
        dv = dt * gate * dx + left_open(1)
        if "dv" in s:
            dv = dv + load(s["dv"], MATRIX)
        do_s[1 + zero] = jnp.where(beta < 2 / dt, -dv * e * slope, 0).astype(BF16)
        new_s[zero] = dx - dv * beta
        do_s[3 + zero] = (dv * (1 - alpha0 * far)).astype(BF16)
        if "new_dv" in refs:
            new_s[1 + zero] = alpha0 * far * dv
        ds_s[zero] = jnp.sum(dv, axis=0)
        d_far = dv * past * alpha0
        do_s[0 + zero] = (d_far * far * (1 - alpha0)).astype(BF16)
        plgpu.commit_smem()
        for q in range(Q):
            plgpu.wgmma(dr_accs[q], do_s.at[q + zero], s["Wo_transposed"].at[q])
        columns = pl.ds(index[0] * COLUMNS, COLUMNS)
        for q in range(Q):
            plgpu.copy_smem_to_gmem(do_s.at[q + zero], refs["do"].at[q, rows, columns])
        for i, name in enumerate(("new_dx", "new_dv")):
            if name in refs:
                plgpu.copy_smem_to_gmem(new_s.at[i + zero], refs[name].at[rows, columns])
        plgpu.copy_smem_to_gmem(ds_s.at[zero], refs["ds"].at[program, columns])
        plgpu.wgmma_wait(0)
        return sum_N + jnp.sum(d_far, axis=1)

    specs = {name: spec for name, spec in _streams(program).items() if name in refs}
    streamed = list(specs)

    def all_chunks(*dr_accs):
        sum_N = plgpu.emit_pipeline(
            lambda *args: chunk(*args, dr_accs=dr_accs),
            grid=(D // COLUMNS,),
            in_specs=list(specs.values()),
            max_concurrent_steps=2,
            init_carry=zeros((ROWS,), PER_ROW),
        )(*[refs[name] for name in streamed])
        return sum_N, [acc[...] for acc in dr_accs]

    sum_N, dr = pl.run_scoped(all_chunks, *[plgpu.ACC((ROWS, WIDTH), F32)] * Q)
    for q in range(Q):
        r_s[q] = jnp.where(load(r_s.at[q], MATRIX).astype(F32) > 0, dr[q], 0).astype(BF16)
    if "pull" in refs:
        rms = of_row("rms")
        row_s[1] = kappa * jnp.exp(-kappa * rms) * sum_N / (D * rms)
    plgpu.commit_smem()
    for q in range(Q):
        plgpu.copy_smem_to_gmem(r_s.at[q], refs["dr"].at[rows, pl.ds(q * WIDTH, WIDTH)])
    if "pull" in refs:
        plgpu.copy_smem_to_gmem(row_s.at[1], refs["pull"].at[rows])
    plgpu.wait_smem_to_gmem(0)


def _streams(program) -> dict[str, Any]:
    """What a program reads by chunks: chunk j of each."""

    def block(shape, index, dtype):
        transforms = tiles(shape[-1], dtype, swizzle=OPERAND if dtype == BF16 else None)
        return plgpu.BlockSpec(shape, index, transforms=transforms)

    of_state = block((ROWS, COLUMNS), lambda j: (program, j), F32)
    return {
        "x": of_state,
        "v": of_state,
        "dx": of_state,
        "dv": of_state,
        "Wo": block((Q, WIDTH, COLUMNS), lambda j: (0, 0, j), BF16),
        "Wo_transposed": block((Q, COLUMNS, WIDTH), lambda j: (0, j, 0), BF16),
        "Ws": block((2 * Q, WIDTH, COLUMNS), lambda j: (0, 0, j), BF16),
        "vectors": plgpu.BlockSpec((6, COLUMNS), lambda j: (0, j)),
    }


def _product_of(pairs):
    """The sum of the products of pairs of operands in shared memory, [ROWS, COLUMNS]."""

    def product(acc):
        for a, b in pairs:
            plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(product, plgpu.ACC((ROWS, COLUMNS), F32))
