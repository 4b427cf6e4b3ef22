"""The integrator neuron layer: T steps of a small, damped, driven dynamical system per token.

A state `x` and a velocity `v` are pulled towards a learned equilibrium `mu`. Four controllers,
small networks that see (context, x, v), choose at every step how much velocity is kept (`alpha`),
how strong the pull is (`beta`), how far the state moves (`gate`) and what velocity to blend in
(`candidate`). A deterministic harmonic excites the system.

The equations come first, then their gradient, written out: automatic differentiation of the loop
would keep about 15 D-wide vectors per token and iteration, this keeps at most 2.

Shapes: B batch, S sequence, D model width, C controller width, T iterations, Q the four
controllers in the order of `CONTROLLERS`, K iterations of one segment.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from inl_jax.config import ModelConfig
from inl_jax.model.params import by_row_shard, declare, row_shards

CONTROLLERS = ("alpha", "beta", "gate", "candidate")
TRAJECTORY = "trajectory"  # what the gradient keeps of the iterations, to a remat policy


class Dynamics(NamedTuple):
    """The constants of a step, static under jit."""

    dt: float  # time step
    kappa: float  # sharpness of alpha's fall near equilibrium; inf for none
    dtype: Any  # of the matrix products


def excitation(gamma_D, phi_D, *, amplitude, num_iterations: int) -> jax.Array:
    """The harmonic drive `A sin(gamma t + phi)` of every iteration, [T, D]."""
    t_T1 = jnp.arange(num_iterations, dtype=gamma_D.dtype)[:, None]
    return amplitude * jnp.sin(gamma_D * t_T1 + phi_D)


def distance(x_BSD, mu_D) -> jax.Array:
    """`rms(x - mu)` over D, [B, S, 1], with a gradient that is finite (and zero) at x == mu."""
    e_BSD = x_BSD - mu_D
    tiny = jnp.finfo(x_BSD.dtype).tiny
    return jnp.sqrt(jnp.mean(e_BSD * e_BSD, axis=-1, keepdims=True) + tiny)


def coefficients(o, rms_BS1, *, dt: float, kappa: float):
    """The coefficients (alpha, beta, gate, candidate) of one step from the controllers' outputs.

    ```
    beta  = min(softplus(o_beta), 2 / dt)
    alpha = sigmoid(o_alpha) * (1 - exp(-kappa * rms(x - mu)))        rms over D
    gate  = sigmoid(o_gate);  candidate = o_candidate
    ```
    The bound on beta keeps `dt * gate * beta < 2 (1 + alpha)`, without which the step diverges.
    """
    o_alpha, o_beta, o_gate, candidate = o
    alpha = jax.nn.sigmoid(o_alpha) * closeness(rms_BS1, kappa=kappa)
    # softplus; XLA's log1p takes half as long again, for digits that beta - 0 does not need
    softplus = jnp.maximum(o_beta, 0) + jnp.log(1 + jnp.exp(-jnp.abs(o_beta)))
    beta = jnp.minimum(softplus, 2 / dt)
    return alpha, beta, jax.nn.sigmoid(o_gate), candidate


def closeness(rms_BS1, *, kappa: float):
    """Alpha's factor `1 - exp(-kappa rms)`; at kappa = inf it is 1, its derivative inf * 0."""
    return 1.0 if math.isinf(kappa) else -jnp.expm1(-kappa * rms_BS1)


def hidden(params, from_context_BSQC, x_BSD, v_BSD, *, dtype) -> jax.Array:
    """The controllers' hidden activations `r = relu(h W_h + x W_x + v W_v + b)`, [B, S, Q, C].

    Args:
      params: as declared by `Integrator`.
      from_context_BSQC: `h W_h + b`, the same at every iteration.
      x_BSD: state.
      v_BSD: velocity; None is zero, and saves its product.
      dtype: type of the product.
    """
    state = [x_BSD] if v_BSD is None else [x_BSD, v_BSD]
    kernel = params["state_kernel"][: len(state)].astype(dtype)
    # Stacked beside D, which may be split over devices.
    product = jnp.einsum("bsed,edqc->bsqc", jnp.stack(state, axis=-2).astype(dtype), kernel)
    return jax.nn.relu(product + from_context_BSQC)


def outputs(params, r_BSQC, *, state_dtype) -> list[jax.Array]:
    """The outputs `o = r W_o + b_o` of each controller, [B, S, D] in `state_dtype`."""
    kernel = params["output_kernel"].astype(r_BSQC.dtype)
    return [
        (r_BSQC[..., q, :] @ kernel[q]).astype(state_dtype) + params["output_bias"][q]
        for q in range(len(CONTROLLERS))
    ]


def advance(params, r_BSQC, rms_BS1, x_BSD, v_BSD, s_D, *, dynamics: Dynamics):
    """(x, v) -> (x', v'), given the hidden activations that (x, v) made.

    ```
    v' = alpha v + (1 - alpha) c - beta (x - mu) + s
    x' = x + dt gate v'
    ```
    """
    o = outputs(params, r_BSQC, state_dtype=x_BSD.dtype)
    alpha, beta, gate, c = coefficients(o, rms_BS1, dt=dynamics.dt, kappa=dynamics.kappa)
    new_v = c + alpha * ((0 if v_BSD is None else v_BSD) - c) - beta * (x_BSD - params["mu"]) + s_D
    return x_BSD + dynamics.dt * gate * new_v, new_v


def step(params, from_context_BSQC, x_BSD, v_BSD, s_D, *, dynamics: Dynamics):
    """One integrator step; returns (x', v') and what the gradient keeps of it, (r, rms)."""
    r_BSQC = hidden(params, from_context_BSQC, x_BSD, v_BSD, dtype=dynamics.dtype)
    rms_BS1 = distance(x_BSD, params["mu"])
    new = advance(params, r_BSQC, rms_BS1, x_BSD, v_BSD, s_D, dynamics=dynamics)
    return new, (r_BSQC, rms_BS1)


def run(params, from_context_BSQC, x_BSD, s_TD, *, dynamics: Dynamics) -> jax.Array:
    """The state after all steps from state `x` and velocity 0, as the equations say it."""
    take = functools.partial(step, params, from_context_BSQC, dynamics=dynamics)

    def body(state, s_D):
        return take(*state, s_D)[0], None

    first, _ = take(x_BSD, None, s_TD[0])
    return jax.lax.scan(body, first, s_TD[1:])[0][0]


# --- the gradient, written out


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def run_lean(params, from_context_BSQC, x_BSD, s_TD, dynamics: Dynamics, segment: int):
    """`run`, with a gradient that keeps little.

    Of every iteration it keeps the hidden activations (Q C values per token) and rms; of every
    `segment` iterations the state and the velocity (2 D) at their start, from which the others are
    computed again.
    """
    return run(params, from_context_BSQC, x_BSD, s_TD, dynamics=dynamics)


def _run_forward(params, from_context_BSQC, x_BSD, s_TD, dynamics, segment):
    cast = _cast_kernels(params, dynamics.dtype)

    def take(state, s_D):
        return step(cast, from_context_BSQC, *state, s_D, dynamics=dynamics)

    def take_segment(state, s_KD):
        new, kept = jax.lax.scan(take, state, s_KD)
        return new, (state, kept)

    s_head, s_segments = _split(s_TD, segment)
    first, kept_first = take((x_BSD, None), s_head[0])
    state, kept_head = jax.lax.scan(take, first, s_head[1:])
    (last_x, _), segments = jax.lax.scan(take_segment, state, s_segments)
    named = checkpoint_name((last_x, kept_first, kept_head, segments), TRAJECTORY)
    return named[0], (params, x_BSD, s_TD, *named[1:])


def _run_backward(dynamics, segment, residuals, dx_BSD):
    params, x_BSD, s_TD, kept_first, kept_head, segments = residuals
    cast = _cast_kernels(params, dynamics.dtype)
    # Once for all iterations in the order that the products back to (x, v) read it in.
    cast["state_kernel"] = cast["state_kernel"].transpose(2, 3, 0, 1)
    s_head, s_segments = _split(s_TD, segment)
    through = functools.partial(_segment_backward, cast, dynamics=dynamics)

    def body(carry, inputs):
        (start, kept), s_KD = inputs
        return through(carry, start, kept, s_KD)

    r_BSQC = kept_first[0]
    kernel_QCD = jnp.zeros((*r_BSQC.shape[2:], x_BSD.shape[-1]), dx_BSD.dtype)
    sums = {
        "context": jnp.zeros(r_BSQC.shape, dx_BSD.dtype),
        "x_kernel": kernel_QCD,
        "v_kernel": kernel_QCD,
        **{n: jnp.zeros_like(params[n]) for n in ("mu", "output_kernel", "output_bias")},
    }
    carry = ((dx_BSD, jnp.zeros_like(dx_BSD)), sums)
    carry, ds_segments = jax.lax.scan(body, carry, (segments, s_segments), reverse=True)
    first = advance(cast, *kept_first, x_BSD, None, s_head[0], dynamics=dynamics)
    carry, ds_head = through(carry, first, kept_head, s_head[1:])
    ((dx_BSD, _), sums), (dr_BSQC, ds_D) = _step_backward(
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
    """The first step and what does not fill a segment; and the segments, [n, K, D]."""
    head = 1 + (len(s_TD) - 1) % segment
    return s_TD[:head], s_TD[head:].reshape(-1, segment, s_TD.shape[-1])


def _segment_backward(params, carry, start, kept, s_KD, *, dynamics: Dynamics):
    """Pulls the gradient back through consecutive steps, given the state before the first."""
    if len(s_KD) == 0:
        return carry, s_KD

    def replay(state, inputs):
        (r_BSQC, rms_BS1), s_D = inputs
        new = advance(params, r_BSQC, rms_BS1, *state, s_D, dynamics=dynamics)
        return new, new

    states = jax.tree.map(lambda a: a[None], start)
    if len(s_KD) > 1:
        _, later = jax.lax.scan(replay, start, jax.tree.map(lambda a: a[:-1], (kept, s_KD)))
        states = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), states, later)

    def body(carry, inputs):
        return _step_backward(params, carry, *inputs, dynamics=dynamics)

    (d_state, sums), (dr_KBSQC, ds_KD) = jax.lax.scan(
        body, carry, (states, kept, s_KD), reverse=True
    )
    inputs = {"x_kernel": states[0], "v_kernel": states[1]}
    return (d_state, _add_products(sums, inputs, dr_KBSQC, dtype=dynamics.dtype)), ds_KD


def _add_products(sums, inputs, dr_KBSQC, *, dtype):
    """Adds the gradient by the state kernel: all tokens and iterations of a segment at once."""
    dr = dr_KBSQC.astype(dtype)
    product = functools.partial(jnp.einsum, "kbsqc,kbsd->qcd")
    return sums | {
        name: sums[name]
        + product(dr, a_KBSD.astype(dtype), preferred_element_type=sums[name].dtype)
        for name, a_KBSD in inputs.items()
    }


def _step_backward(params, carry, state, kept, s_D, *, dynamics: Dynamics):
    """Pulls the gradient back through one step.

    Args:
      params: kernels in the type of the products, the state kernel as [Q, C, 2, D].
      carry: gradients by (x', v'), and the sums of those by the context and the parameters.
      state: (x, v) before the step.
      kept: (r, rms).
      s_D: the excitation.
      dynamics: constants.

    Returns:
      The carry before the step, and (dr, ds).
    """
    (dx_BSD, dv_BSD), sums = carry
    (x_BSD, v_BSD), (r_BSQC, rms_BS1) = state, kept
    dt, kappa, dtype = dynamics
    wide = dx_BSD.dtype
    # Forward once more, from the hidden activations on.
    o = outputs(params, r_BSQC, state_dtype=wide)
    alpha, beta, gate, c = coefficients(o, rms_BS1, dt=dt, kappa=kappa)
    alpha0 = jax.nn.sigmoid(o[0])
    e_BSD = x_BSD - params["mu"]
    past = -c if v_BSD is None else v_BSD - c
    new_v = c + alpha * past - beta * e_BSD + s_D
    # v' is the next velocity, and moves x'.
    dv_BSD = dv_BSD + dt * gate * dx_BSD
    d_alpha = dv_BSD * past
    do = [
        d_alpha * alpha * (1 - alpha0),
        jnp.where(beta < 2 / dt, -dv_BSD * e_BSD * jax.nn.sigmoid(o[1]), 0),
        dt * dx_BSD * new_v * gate * (1 - gate),
        dv_BSD * (1 - alpha),
    ]
    de_BSD = -dv_BSD * beta
    if not math.isinf(kappa):  # the gradient by rms is one scalar per token
        d_rms = kappa * jnp.exp(-kappa * rms_BS1) * jnp.sum(d_alpha * alpha0, -1, keepdims=True)
        de_BSD = de_BSD + d_rms / (e_BSD.shape[-1] * rms_BS1) * e_BSD
    product = functools.partial(jnp.einsum, preferred_element_type=wide)
    narrow, W_o = [d.astype(dtype) for d in do], params["output_kernel"]
    dr = [product("bsd,cd->bsc", d, W_o[q]) for q, d in enumerate(narrow)]
    dr_BSQC = jnp.where(r_BSQC > 0, jnp.stack(dr, axis=-2), 0)
    dW_o = [product("bsc,bsd->cd", r_BSQC[..., q, :], d) for q, d in enumerate(narrow)]
    sums = sums | {
        "context": sums["context"] + dr_BSQC,
        "output_kernel": sums["output_kernel"] + jnp.stack(dW_o),
        "output_bias": sums["output_bias"] + jnp.stack([d.sum((0, 1)) for d in do]),
        "mu": sums["mu"] - de_BSD.sum((0, 1)),
    }
    kernel_QCED = params["state_kernel"][:, :, : 1 if v_BSD is None else 2]
    d_products = product("bsqc,qced->bsed", dr_BSQC.astype(dtype), kernel_QCED)
    dx_BSD = dx_BSD + de_BSD + d_products[..., 0, :]
    dv_before = None if v_BSD is None else alpha * dv_BSD + d_products[..., 1, :]
    return ((dx_BSD, dv_before), sums), (dr_BSQC, dv_BSD.sum((0, 1)))


# --- the layer


def integrate(
    params,
    h_BSD,
    x_BSD,
    *,
    amplitude,
    num_iterations: int,
    dynamics: Dynamics,
    gradient: str = "lean",
    segment: int = 1,
    chunk: int = 0,
    remat: bool = False,
) -> jax.Array:
    """Runs `num_iterations` steps from state `x` and velocity 0; returns the last state.

    Args:
      params: as declared by `Integrator`, in any float type.
      h_BSD: the context, constant over the iterations.
      x_BSD: the initial state.
      amplitude: excitation amplitude A, a number or a traced scalar.
      num_iterations: T.
      dynamics: constants of a step. Products are in `dynamics.dtype`; the state stays in float32
        (float64 if `x` is): in bfloat16 the dynamics stagnate.
      gradient: "lean", written out here; or "autodiff", of the plain loop, to compare with.
      segment: iterations between the states that "lean" keeps.
      chunk: positions that go through all iterations together; 0 takes all.
      remat: keep only `h` and `x`, and run the iterations again in the backward pass.
    """
    state_dtype = jnp.promote_types(jnp.float32, x_BSD.dtype)
    # Cast outside the loop, so that gradients add up over iterations and chunks in this type.
    params = jax.tree.map(lambda p: p.astype(state_dtype), params)
    s_TD = excitation(
        params["gamma"], params["phi"], amplitude=amplitude, num_iterations=num_iterations
    )

    def refine(inputs):
        h_BSD, x_BSD = inputs
        dtype = dynamics.dtype
        kernel, bias = params["context_kernel"].astype(dtype), params["hidden_bias"].astype(dtype)
        from_context_BSQC = jnp.einsum("bsd,dqc->bsqc", h_BSD.astype(dtype), kernel) + bias
        arrays = (
            {n: params[n] for n in ("mu", "state_kernel", "output_kernel", "output_bias")},
            from_context_BSQC,
            x_BSD.astype(state_dtype),
            s_TD,
        )
        if gradient == "autodiff":
            return run(*arrays, dynamics=dynamics)
        return run_lean(*arrays, dynamics, segment)

    if remat:
        refine = jax.checkpoint(refine, prevent_cse=False)

    def refine_all(inputs):
        S = x_BSD.shape[1]
        if chunk == 0 or chunk >= S:
            return refine(inputs)
        chunks = jax.tree.map(lambda a: split_positions(a, chunk), inputs)
        return join_positions(jax.lax.map(refine, chunks), S)

    N = row_shards(len(x_BSD))
    if N == 1:
        return refine_all(spread((h_BSD, x_BSD), ("batch",)))
    # The gradients by the parameters add up for each part of the rows by itself, or devices would
    # exchange them in every iteration.
    parts = spread(by_row_shard((h_BSD, x_BSD), N), ("batch", None))
    return jax.vmap(refine_all)(parts).reshape(x_BSD.shape)


def spread(tree, rows):
    """Arrays [..., S, D] with D split as the parameters' is: each device has its channels."""
    axes = (*rows, "sequence", "channels")
    return jax.tree.map(lambda a: nn.with_logical_constraint(a, axes), tree)


def split_positions(a_BSX, chunk: int) -> jax.Array:
    """[B, S, ...] to [n, B, chunk, ...], padded with zeros at the end of the sequence."""
    B, S = a_BSX.shape[:2]
    pad = [(0, 0), (0, -S % chunk)] + [(0, 0)] * (a_BSX.ndim - 2)
    return jnp.pad(a_BSX, pad).reshape(B, -1, chunk, *a_BSX.shape[2:]).swapaxes(0, 1)


def join_positions(a_nBKX, num_positions: int) -> jax.Array:
    """The inverse of `split_positions`."""
    n, B, K = a_nBKX.shape[:3]
    return a_nBKX.swapaxes(0, 1).reshape(B, n * K, *a_nBKX.shape[3:])[:, :num_positions]


def _output_bias_init(key, shape, dtype):
    """alpha0 = 0.8, beta = 0.5, gate = 0.5, candidate = 0 at the start."""
    del key
    start = (math.log(0.8 / 0.2), math.log(math.expm1(0.5)), 0.0, 0.0)
    return jnp.broadcast_to(jnp.array(start, dtype)[:, None], shape)


class Integrator(nn.Module):
    """Declares the parameters of `integrate`."""

    config: ModelConfig

    @nn.compact
    def __call__(self, h_BSD, x_BSD, *, amplitude, dtype) -> jax.Array:
        """`integrate` with this layer's parameters: context and initial state to last state."""
        c = self.config
        D, C, Q = c.d_model, c.controller_width, len(CONTROLLERS)
        init = nn.initializers
        hidden_init = init.normal((3 * D) ** -0.5)  # lecun-normal; each unit reads (h, x, v)
        declared = {
            "mu": (init.zeros, (D,), ("channels",)),
            "gamma": (lambda *a: 1 + init.normal(0.1)(*a), (D,), ("channels",)),
            "phi": (init.uniform(2 * math.pi), (D,), ("channels",)),
            "context_kernel": (hidden_init, (D, Q, C), ("state", None, None)),
            "state_kernel": (hidden_init, (2, D, Q, C), (None, "state", None, None)),
            "hidden_bias": (init.zeros, (Q, C), (None, None)),
            "output_kernel": (init.normal(0.01), (Q, C, D), (None, None, "state")),
            "output_bias": (_output_bias_init, (Q, D), (None, "channels")),
        }
        params = {
            name: declare(self, name, *declaration, param_dtype=c.param_dtype)
            for name, declaration in declared.items()
        }
        return integrate(
            params,
            h_BSD,
            x_BSD,
            amplitude=amplitude,
            num_iterations=c.num_iterations,
            dynamics=Dynamics(c.dt, c.kappa, dtype),
            gradient=c.integrator_gradient,
            segment=c.integrator_segment,
            chunk=c.integrator_chunk,
            remat=c.remat == "integrator",
        )
