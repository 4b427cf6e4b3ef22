"""The gradient of `dynamics.run`, written out.

It exists to save memory. At the 3b's shapes, automatic differentiation of the plain scan keeps 17.3
vectors of width D per token and step, this gradient 2.1, or 0.53 in segments of 7 steps
(docs/benchmarks.md). In float64 the two agree within 1e-10 (tests/model/test_dynamics_vjp.py).

The forward pass keeps, of every step, the hidden activations `r` (Q C values per token) and
`rms(e)`; and of every segment of K steps, the state and the velocity (2 D values) before its first
step. From these the backward pass recomputes the other states of the segment, without the products
with Wx and Wv.

`step_backward` is the gradient of the equations in `dynamics.py`; the rest is bookkeeping. The
steps are a loop, or straight code with `unroll`: then XLA stacks no trajectory, and the pass over
memory that ends the gradient of one step also begins that of the step before.

Shapes: as in `dynamics.py`; K steps of one segment, n segments. `dx` is the gradient by `x`.
Gradients are added up in the type of the state.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from inl_jax.model.dynamics import (
    Dynamics,
    coefficients,
    controller_outputs,
    move,
    run,
    step,
    written,
)

TRAJECTORY = "trajectory"  # the name by which a remat policy can save what this gradient keeps
ONES = 8  # constant hidden units; a width that 8 divides suits tensor cores


class Loop(NamedTuple):
    """How the steps run and what is kept of them, static under jit."""

    segment: int = 1  # K, in steps
    trajectory_dtype: Any = None  # in which (x, v) are kept; None: the state's
    unroll: bool = False  # straight code

    def scan(self, *args, **kwargs):
        """`jax.lax.scan`, in a loop or as straight code."""
        return jax.lax.scan(*args, unroll=self.unroll, **kwargs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def run_lean(params, from_context_BSQC, x_BSD, s_TD, dynamics: Dynamics, loop: Loop):
    """`dynamics.run`, with the gradient of this file."""
    return run(params, from_context_BSQC, x_BSD, s_TD, dynamics=dynamics, unroll=loop.unroll)


@jax.named_scope("integrator_forward")
def _run_forward(params, from_context_BSQC, x_BSD, s_TD, dynamics, loop):
    cast = _cast_kernels(params, dynamics.dtype)

    def take_step(xv, s_D):
        return step(cast, from_context_BSQC, *xv, s_D, dynamics=dynamics)

    def take_segment(xv, s_KD):
        start = jax.tree.map(lambda a: a.astype(loop.trajectory_dtype or a.dtype), xv)
        new_xv, kept = loop.scan(take_step, xv, s_KD)
        return new_xv, (start, kept)

    s_head, s_segments = _split(s_TD, loop.segment)
    xv, kept_first = take_step((x_BSD, None), s_head[0])
    xv, kept_head = loop.scan(take_step, xv, s_head[1:])
    (last_x, _), segments = loop.scan(take_segment, xv, s_segments)
    named = checkpoint_name((last_x, kept_first, kept_head, segments), TRAJECTORY)
    return named[0], (params, x_BSD, s_TD, *named[1:])


@jax.named_scope("integrator_backward")
def _run_backward(dynamics, loop, residuals, dx_T_BSD):
    params, x_BSD, s_TD, kept_first, kept_head, segments = residuals
    cast = _cast_kernels(params, dynamics.dtype)
    # The products back to (x, v) read the kernel in this order: transpose once, not in every step.
    cast["state_kernel"] = cast["state_kernel"].transpose(0, 2, 3, 1)
    s_head, s_segments = _split(s_TD, loop.segment)
    segment_backward = functools.partial(_segment_backward, cast, dynamics=dynamics, loop=loop)

    def body(carry, inputs):
        (start, kept), s_KD = inputs
        return segment_backward(carry, start, kept, s_KD)

    (*_, Q, C), D = kept_first[0].shape, x_BSD.shape[-1]
    zeros = functools.partial(jnp.zeros, dtype=dx_T_BSD.dtype)
    sums = {
        "context": zeros(kept_first[0].shape),
        "state_kernel": [zeros((Q, C, D))] * 2,
        "output": [zeros((C + ONES, D))] * Q,
    }
    # The segments, last to first; then the steps that fill no segment; then the first step.
    carry = ((dx_T_BSD, jnp.zeros_like(dx_T_BSD)), sums)
    carry, ds_segments = loop.scan(body, carry, (segments, s_segments), reverse=True)
    after_first = move(cast, *kept_first, x_BSD, None, s_head[0], dynamics=dynamics)
    carry, ds_head = segment_backward(carry, after_first, kept_head, s_head[1:])
    ((dx_BSD, _), sums), ds_D = step_backward(
        cast, carry, (x_BSD, None), kept_first, s_head[0], dynamics=dynamics
    )
    ds_TD = jnp.concatenate([ds_D[None], ds_head, ds_segments.reshape(-1, D)])
    d_context_BSQC, d_output = sums["context"], jnp.stack(sums["output"])
    # Every step adds de + dr Wx^T to dx, and subtracts de from the gradient by mu.
    Wx_DQC = params["state_kernel"][0]
    d_mu_D = (dx_T_BSD - dx_BSD).sum((0, 1)) + Wx_DQC.reshape(D, -1) @ d_context_BSQC.sum(
        (0, 1)
    ).reshape(-1)
    d_params = {
        "mu": d_mu_D,
        "state_kernel": jnp.stack(sums["state_kernel"]).transpose(0, 3, 1, 2),
        "output_kernel": d_output[:, :C],
        "output_bias": d_output[:, C],
    }
    return d_params, d_context_BSQC.astype(dynamics.dtype), dx_BSD, ds_TD


run_lean.defvjp(_run_forward, _run_backward)


def _cast_kernels(params, dtype):
    return params | {n: params[n].astype(dtype) for n in ("state_kernel", "output_kernel")}


def _split(s_TD, segment: int):
    """The first step with the steps that fill no segment, [., D]; and the segments, [n, K, D]."""
    head = 1 + (len(s_TD) - 1) % segment
    return s_TD[:head], s_TD[head:].reshape(-1, segment, s_TD.shape[-1])


def _segment_backward(params, carry, start, kept, s_KD, *, dynamics: Dynamics, loop: Loop):
    """Takes the carry of `step_backward` back through K steps, given (x, v) before the first."""
    if len(s_KD) == 0:
        return carry, s_KD
    start = jax.tree.map(lambda a: a.astype(s_KD.dtype), start)

    def replay(xv, inputs):
        (r_BSQC, rms_BS1), s_D = inputs
        new_xv = move(params, r_BSQC, rms_BS1, *xv, s_D, dynamics=dynamics)
        return new_xv, new_xv

    states = jax.tree.map(lambda a: a[None], start)
    if len(s_KD) > 1:
        _, later = loop.scan(replay, start, jax.tree.map(lambda a: a[:-1], (kept, s_KD)))
        states = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), states, later)

    def body(carry, inputs):
        return step_backward(params, carry, *inputs, dynamics=dynamics)

    return loop.scan(body, carry, (states, kept, s_KD), reverse=True)


def step_backward(params, carry, xv, kept, s_D, *, dynamics: Dynamics):
    """The gradient of one step, line by line the equations of `dynamics.py` from last to first.

    Args:
      params: the kernels in the products' type, `state_kernel` as [2, Q, C, D].
      carry: the gradients by (x', v'); and the sums so far of those by the context, by Wx and Wv
        [Q, C, D], and by each controller's Wo with `ONES` rows that are bo's, [C + ONES, D].
      xv: (x, v) before the step; v is None for zero.
      kept: (r, rms(e)).
      s_D: the excitation of this step.
      dynamics: constants.

    Returns:
      The carry before the step; and the gradient by the excitation.
    """
    (dx_BSD, dv_BSD), sums = carry
    # Holds back the products that make o again. XLA would find them in a forward pass and keep all
    # of them, or make all of them before the first is needed.
    kept, d_context_BSQC = written((kept, sums["context"]))
    (x_BSD, v_BSD), (r_BSQC, rms_BS1) = xv, kept
    dt, kappa, dtype = dynamics
    state_dtype = dx_BSD.dtype
    # Forward once more, from r on.
    o = controller_outputs(params, r_BSQC)
    alpha, beta, gate, c = coefficients(o, rms_BS1, dt=dt, kappa=kappa)
    alpha0 = jax.nn.sigmoid(o[0])
    e_BSD = x_BSD - params["mu"]
    past = -c if v_BSD is None else v_BSD - c
    new_v = c + alpha * past - beta * e_BSD + s_D
    # x' = x + dt gate v', and v' is also the next step's velocity.
    dv_BSD = dv_BSD + dt * gate * dx_BSD
    # v' = c + alpha (v - c) - beta e + s, through sigmoid, bounded softplus and sigmoid.
    d_alpha = dv_BSD * past
    do = [
        d_alpha * alpha * (1 - alpha0),
        jnp.where(beta < 2 / dt, -dv_BSD * e_BSD * jax.nn.sigmoid(o[1]), 0),
        dt * dx_BSD * new_v * gate * (1 - gate),
        dv_BSD * (1 - alpha),
    ]
    # rms(e) enters through alpha: its gradient is one scalar per token.
    d_rms_BS1 = jnp.sum(d_alpha * alpha0, axis=-1, keepdims=True)
    # The first pass over memory ends here, with v' = alpha v - beta e + .. taken back to (x, v).
    do, d_rms_BS1, dx_BSD, dv_BSD = written(
        ([d.astype(dtype) for d in do], d_rms_BS1, dx_BSD - beta * dv_BSD, alpha * dv_BSD)
    )
    if not math.isinf(kappa):
        d_rms_BS1 = d_rms_BS1 * kappa * jnp.exp(-kappa * rms_BS1)
        dx_BSD = dx_BSD + d_rms_BS1 / (e_BSD.shape[-1] * rms_BS1) * e_BSD
    # o = r Wo + bo; bo is the kernel of hidden units that are always 1, so that one product sums
    # both gradients over the tokens.
    product = functools.partial(jnp.einsum, preferred_element_type=state_dtype)
    Wo_QCD, ones = params["output_kernel"], jnp.ones((*r_BSQC.shape[:2], ONES), dtype)
    dr, d_output = [], []
    for q, do_BSD in enumerate(do):
        r1_BSC = jnp.concatenate([r_BSQC[..., q, :], ones], axis=-1)
        d_output.append(product("bsc,bsd->cd", r1_BSC, do_BSD))
        dr.append(product("bsd,cd->bsc", do_BSD, Wo_QCD[q]))
    # r = relu(h Wh + x Wx + v Wv + b)
    dr_BSQC = jnp.where(r_BSQC > 0, jnp.stack(dr, axis=-2), 0)
    narrow_dr = dr_BSQC.astype(dtype)
    d_kernels, d_xv = [], []
    for W_QCD, a_BSD in zip(params["state_kernel"], (x_BSD, v_BSD), strict=True):
        if a_BSD is None:
            d_kernels.append(0)
            d_xv.append(0)
            continue
        d_kernels.append(product("bsqc,bsd->qcd", narrow_dr, a_BSD.astype(dtype)))
        d_xv.append(jnp.einsum("bsqc,qcd->bsd", narrow_dr, W_QCD))
    d_xv, d_output, d_kernels = written((d_xv, d_output, d_kernels))
    # s enters v' alone, and dv is split into (1 - alpha) dv for c and alpha dv for v.
    ds_D = d_output[-1][-1] + dv_BSD.sum((0, 1))
    sums = {
        "context": d_context_BSQC + dr_BSQC,
        "state_kernel": [a + b for a, b in zip(sums["state_kernel"], d_kernels, strict=True)],
        "output": [a + b for a, b in zip(sums["output"], d_output, strict=True)],
    }
    return ((dx_BSD + d_xv[0], dv_BSD + d_xv[1]), sums), ds_D
