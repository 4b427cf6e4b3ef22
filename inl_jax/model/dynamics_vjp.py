"""The gradient of `dynamics.run`, written out.

It exists to save memory. At the 3b's shapes, automatic differentiation of the plain scan keeps 17.3
vectors of width D per token and step, this gradient 2.1, or 0.53 in segments of 7 steps
(docs/benchmarks.md). In float64 the two agree within 1e-10 (tests/model/test_dynamics_vjp.py).

The forward pass keeps, of every step, the hidden activations `r` (Q C values per token) and
`rms(e)`; and of every segment of K steps, the state and the velocity (2 D values) before its first
step. From these the backward pass recomputes the other states of the segment, without the products
with Wx and Wv.

`step_backward` is the gradient of the equations in `dynamics.py`; the rest is bookkeeping.

Shapes: as in `dynamics.py`; K steps of one segment, n segments, E the two inputs (x, v) of
`state_kernel`. `dx` is the gradient by `x`. Gradients are added up in the type of the state.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from inl_jax.model.dynamics import Dynamics, coefficients, controller_outputs, move, run, step

TRAJECTORY = "trajectory"  # the name by which a remat policy can save what this gradient keeps


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def run_lean(params, from_context_BSQC, x_BSD, s_TD, dynamics: Dynamics, segment: int):
    """`dynamics.run`, with the gradient of this file. `segment` is K, in steps."""
    return run(params, from_context_BSQC, x_BSD, s_TD, dynamics=dynamics)


def _run_forward(params, from_context_BSQC, x_BSD, s_TD, dynamics, segment):
    cast = _cast_kernels(params, dynamics.dtype)

    def take_step(xv, s_D):
        return step(cast, from_context_BSQC, *xv, s_D, dynamics=dynamics)

    def take_segment(xv, s_KD):
        new_xv, kept = jax.lax.scan(take_step, xv, s_KD)
        return new_xv, (xv, kept)

    s_head, s_segments = _split(s_TD, segment)
    xv, kept_first = take_step((x_BSD, None), s_head[0])
    xv, kept_head = jax.lax.scan(take_step, xv, s_head[1:])
    (last_x, _), segments = jax.lax.scan(take_segment, xv, s_segments)
    named = checkpoint_name((last_x, kept_first, kept_head, segments), TRAJECTORY)
    return named[0], (params, x_BSD, s_TD, *named[1:])


def _run_backward(dynamics, segment, residuals, dx_BSD):
    params, x_BSD, s_TD, kept_first, kept_head, segments = residuals
    cast = _cast_kernels(params, dynamics.dtype)
    # The products back to (x, v) read the kernel in this order: transpose once, not in every step.
    cast["state_kernel"] = cast["state_kernel"].transpose(2, 3, 0, 1)
    s_head, s_segments = _split(s_TD, segment)
    segment_backward = functools.partial(_segment_backward, cast, dynamics=dynamics)

    def body(carry, inputs):
        (start, kept), s_KD = inputs
        return segment_backward(carry, start, kept, s_KD)

    r_BSQC = kept_first[0]
    zero_QCD = jnp.zeros((*r_BSQC.shape[2:], x_BSD.shape[-1]), dx_BSD.dtype)
    sums = {
        "context": jnp.zeros(r_BSQC.shape, dx_BSD.dtype),
        "x_kernel": zero_QCD,
        "v_kernel": zero_QCD,
        **{n: jnp.zeros_like(params[n]) for n in ("mu", "output_kernel", "output_bias")},
    }
    # The segments, last to first; then the steps that fill no segment; then the first step.
    carry = ((dx_BSD, jnp.zeros_like(dx_BSD)), sums)
    carry, ds_segments = jax.lax.scan(body, carry, (segments, s_segments), reverse=True)
    after_first = move(cast, *kept_first, x_BSD, None, s_head[0], dynamics=dynamics)
    carry, ds_head = segment_backward(carry, after_first, kept_head, s_head[1:])
    ((dx_BSD, _), sums), (dr_BSQC, ds_D) = step_backward(
        cast, carry, (x_BSD, None), kept_first, s_head[0], dynamics=dynamics
    )
    sums = _add_products(sums, {"x_kernel": x_BSD[None]}, dr_BSQC[None], dtype=dynamics.dtype)
    ds_TD = jnp.concatenate([ds_D[None], ds_head, ds_segments.reshape(-1, len(ds_D))])
    d_context = sums.pop("context").astype(r_BSQC.dtype)
    d_state_kernel = jnp.stack([sums.pop("x_kernel"), sums.pop("v_kernel")])
    return sums | {"state_kernel": d_state_kernel.transpose(0, 3, 1, 2)}, d_context, dx_BSD, ds_TD


run_lean.defvjp(_run_forward, _run_backward)


def _cast_kernels(params, dtype):
    return params | {n: params[n].astype(dtype) for n in ("state_kernel", "output_kernel")}


def _split(s_TD, segment: int):
    """The first step with the steps that fill no segment, [., D]; and the segments, [n, K, D]."""
    head = 1 + (len(s_TD) - 1) % segment
    return s_TD[:head], s_TD[head:].reshape(-1, segment, s_TD.shape[-1])


def _segment_backward(params, carry, start, kept, s_KD, *, dynamics: Dynamics):
    """Takes the carry of `step_backward` back through K steps, given (x, v) before the first."""
    if len(s_KD) == 0:
        return carry, s_KD

    def replay(xv, inputs):
        (r_BSQC, rms_BS1), s_D = inputs
        new_xv = move(params, r_BSQC, rms_BS1, *xv, s_D, dynamics=dynamics)
        return new_xv, new_xv

    states = jax.tree.map(lambda a: a[None], start)
    if len(s_KD) > 1:
        _, later = jax.lax.scan(replay, start, jax.tree.map(lambda a: a[:-1], (kept, s_KD)))
        states = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), states, later)

    def body(carry, inputs):
        return step_backward(params, carry, *inputs, dynamics=dynamics)

    (d_xv, sums), (dr_KBSQC, ds_KD) = jax.lax.scan(body, carry, (states, kept, s_KD), reverse=True)
    inputs = {"x_kernel": states[0], "v_kernel": states[1]}
    return (d_xv, _add_products(sums, inputs, dr_KBSQC, dtype=dynamics.dtype)), ds_KD


def _add_products(sums, inputs, dr_KBSQC, *, dtype):
    """Adds the gradients by Wx and Wv, [Q, C, D]: one product for all K steps of a segment."""
    dr = dr_KBSQC.astype(dtype)
    product = functools.partial(jnp.einsum, "kbsqc,kbsd->qcd")
    return sums | {
        name: sums[name]
        + product(dr, a_KBSD.astype(dtype), preferred_element_type=sums[name].dtype)
        for name, a_KBSD in inputs.items()
    }


def step_backward(params, carry, xv, kept, s_D, *, dynamics: Dynamics):
    """The gradient of one step, line by line the equations of `dynamics.py` from last to first.

    Args:
      params: the kernels in the products' type, `state_kernel` as [Q, C, E, D].
      carry: the gradients by (x', v'), and the sums so far of those by the context and the
        parameters.
      xv: (x, v) before the step; v is None for zero.
      kept: (r, rms(e)).
      s_D: the excitation of this step.
      dynamics: constants.

    Returns:
      The carry before the step; and (dr, ds), the gradients by the hidden activations' input and
      by the excitation.
    """
    (dx_BSD, dv_BSD), sums = carry
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
    # e enters v', and alpha through rms(e), whose gradient is one scalar per token.
    de_BSD = -dv_BSD * beta
    if not math.isinf(kappa):
        d_rms = kappa * jnp.exp(-kappa * rms_BS1) * jnp.sum(d_alpha * alpha0, -1, keepdims=True)
        de_BSD = de_BSD + d_rms / (e_BSD.shape[-1] * rms_BS1) * e_BSD
    # o = r Wo + bo
    product = functools.partial(jnp.einsum, preferred_element_type=state_dtype)
    narrow, Wo_QCD = [d.astype(dtype) for d in do], params["output_kernel"]
    dr = [product("bsd,cd->bsc", d, Wo_QCD[q]) for q, d in enumerate(narrow)]
    dWo = [product("bsc,bsd->cd", r_BSQC[..., q, :], d) for q, d in enumerate(narrow)]
    # r = relu(h Wh + x Wx + v Wv + b)
    dr_BSQC = jnp.where(r_BSQC > 0, jnp.stack(dr, axis=-2), 0)
    W_QCED = params["state_kernel"][:, :, : 1 if v_BSD is None else 2]
    d_products = product("bsqc,qced->bsed", dr_BSQC.astype(dtype), W_QCED)
    sums = sums | {
        "context": sums["context"] + dr_BSQC,
        "output_kernel": sums["output_kernel"] + jnp.stack(dWo),
        "output_bias": sums["output_bias"] + jnp.stack([d.sum((0, 1)) for d in do]),
        "mu": sums["mu"] - de_BSD.sum((0, 1)),
    }
    dx_before = dx_BSD + de_BSD + d_products[..., 0, :]
    dv_before = None if v_BSD is None else alpha * dv_BSD + d_products[..., 1, :]
    return ((dx_before, dv_before), sums), (dr_BSQC, dv_BSD.sum((0, 1)))
