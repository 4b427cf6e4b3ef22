"""One step of the integrator neuron layer as its equations, and the plain scan over T steps.

Every token has a state `x` and a velocity `v`. A step pulls the state towards a learned equilibrium
`mu`. Four controllers, small networks that read the context `h`, `x` and `v`, choose how much
velocity is kept (`alpha`), how strong the pull is (`beta`), how far the state moves (`gate`) and
which velocity is blended in (the candidate `c`). A harmonic excites the system. All tokens take T
steps in `run`; in `run_until`, for evaluation and generation, a token stops once it hardly moves.

    x_0 = n, v_0 = 0;  for t = 0 .. T-1:                  n: the normalised stream
    r_k    = relu(h Wh_k + x Wx_k + v Wv_k + b_k)         k: alpha, beta, gate, candidate
    o_k    = r_k Wo_k + bo_k
    e      = x - mu
    alpha  = sigmoid(o_alpha) (1 - exp(-kappa rms(e)))    rms over the D channels
    beta   = min(softplus(o_beta), 2 / dt)
    gate   = sigmoid(o_gate)
    c      = o_candidate
    s      = A sin(gamma t + phi)                         t: the number of the step
    v'     = alpha v + (1 - alpha) c - beta e + s
    x'     = x + dt gate v'

To change an equation, change it here and train with `integrator_gradient="autodiff"`, which
differentiates this file. The default gradient is written out by hand: `step_backward` in
`dynamics_vjp.py` must follow, and `tests/model/test_dynamics_vjp.py` fails until it does. New
parameters are declared in `integrator.py`.

Shapes: B batch, S sequence, D width, C controller width, Q the four controllers, E the two inputs
(x, v) of `state_kernel`, T steps, at least 1; 1 an axis of size 1.
Parameters: Wh `context_kernel` [D, Q, C], Wx and Wv `state_kernel` [2, D, Q, C], b `hidden_bias`
[Q, C], Wo `output_kernel` [Q, C, D], bo `output_bias` [Q, D]; `mu`, `gamma`, `phi` [D]. C may be 0:
the controllers are then constants of each channel, bo.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from inl_jax.model.params import current_channel_shards

CONTROLLERS = ("alpha", "beta", "gate", "candidate")  # their order on the axis Q


# Makes XLA write these arrays to memory, all in one pass. Without it XLA may write the wider values
# that they are rounded from, read those again in another pass, or compute the arrays twice.
written = jax.lax.optimization_barrier


class Dynamics(NamedTuple):
    """The constants of a step, static under jit."""

    dt: float  # time step
    kappa: float  # how sharply alpha falls to 0 near the equilibrium; inf: not at all
    dtype: Any  # of the matrix products; the state has its own, wider type


def excitation(gamma_D, phi_D, *, amplitude, num_iterations: int) -> jax.Array:
    """`s_t = A sin(gamma t + phi)` for t = 0 .. T-1, [T, D]."""
    t_T1 = jnp.arange(num_iterations, dtype=gamma_D.dtype)[:, None]
    return amplitude * jnp.sin(gamma_D * t_T1 + phi_D)


def complete(params):
    """Adds kernels of width 0 if there are none: Orbax saves no empty array (0.12)."""
    if "output_kernel" in params:
        return params
    Q, D = params["output_bias"].shape
    kernels = {
        "context_kernel": (D, Q, 0),
        "state_kernel": (2, D, Q, 0),
        "hidden_bias": (Q, 0),
        "output_kernel": (Q, 0, D),
    }
    return params | {name: jnp.zeros(of, params["mu"].dtype) for name, of in kernels.items()}


def hidden_from_context(params, h_BSD, *, dtype) -> jax.Array:
    """`h Wh + b`, [B, S, Q, C]: the part of the controllers' input that no step changes."""
    Wh_DQC, b_QC = params["context_kernel"].astype(dtype), params["hidden_bias"].astype(dtype)
    return jnp.einsum("bsd,dqc->bsqc", h_BSD.astype(dtype), Wh_DQC) + b_QC


def controller_hidden(params, from_context_BSQC, x_BSD, v_BSD) -> jax.Array:
    """`r = relu(h Wh + x Wx + v Wv + b)`, [B, S, Q, C]; `x` and `v` are in the products' type."""
    W_EDQC = params["state_kernel"].astype(x_BSD.dtype)
    state = [x_BSD] if v_BSD is None else [x_BSD, v_BSD]
    if current_channel_shards() > 1:  # one product, in its own type: devices exchange it
        xv_BSED = jnp.stack(state, axis=-2)
        products = [jnp.einsum("bsed,edqc->bsqc", xv_BSED, W_EDQC[: len(state)])]
    else:
        products = [
            jnp.einsum("bsd,dqc->bsqc", a_BSD, W_DQC, preferred_element_type=params["mu"].dtype)
            for a_BSD, W_DQC in zip(state, W_EDQC, strict=False)
        ]
    return jax.nn.relu(sum(products, from_context_BSQC)).astype(x_BSD.dtype)


def controller_outputs(params, r_BSQC) -> list[jax.Array]:
    """`o_k = r_k Wo_k + bo_k` of each controller, [B, S, D] in the type of the state."""
    Wo_QCD, bo_QD = params["output_kernel"].astype(r_BSQC.dtype), params["output_bias"]
    o = written([r_BSQC[..., q, :] @ Wo_QCD[q] for q in range(len(CONTROLLERS))])
    return [o_BSD + bo_D for o_BSD, bo_D in zip(o, bo_QD, strict=True)]


def rms_error(x_BSD, mu_D) -> jax.Array:
    """`rms(e)` with `e = x - mu`, over D: [B, S, 1]."""
    e_BSD = x_BSD - mu_D
    tiny = jnp.finfo(x_BSD.dtype).tiny  # without it the gradient at e = 0 is NaN
    return jnp.sqrt(jnp.mean(e_BSD * e_BSD, axis=-1, keepdims=True) + tiny)


def coefficients(o, rms_BS1, *, dt: float, kappa: float):
    """The coefficients (alpha, beta, gate, c) of one step.

    alpha = sigmoid(o_alpha) (1 - exp(-kappa rms(e)))
    beta  = min(softplus(o_beta), 2 / dt)
    gate  = sigmoid(o_gate)
    c     = o_candidate

    For fixed coefficients the step is stable if and only if `dt gate beta < 2 (1 + alpha)`, and
    alpha can be 0: hence the bound on beta. It says nothing of the feedback through c(x, v).
    """
    o_alpha, o_beta, o_gate, o_candidate = o
    alpha = jax.nn.sigmoid(o_alpha)
    if not math.isinf(kappa):  # at inf the factor is 1, but its derivative would be inf * 0
        alpha = alpha * -jnp.expm1(-kappa * rms_BS1)
    beta = jnp.minimum(softplus(o_beta), 2 / dt)
    gate = jax.nn.sigmoid(o_gate)
    return alpha, beta, gate, o_candidate


def softplus(o):
    """`log(1 + exp(o))`, by operations that are fast everywhere."""
    # log(1 + y) for log1p(y): 1.5 times as fast in XLA, and `beta e` does not need its digits.
    return jnp.maximum(o, 0) + jnp.log(1 + jnp.exp(-jnp.abs(o)))


def move(params, r_BSQC, rms_BS1, x_BSD, v_BSD, s_D, *, dynamics: Dynamics):
    """(x', v') from (x, v), the hidden activations `r` and `rms(e)`.

    v' = alpha v + (1 - alpha) c - beta e + s             computed as c + alpha (v - c) - beta e + s
    x' = x + dt gate v'
    """
    o = controller_outputs(params, r_BSQC)
    alpha, beta, gate, c = coefficients(o, rms_BS1, dt=dynamics.dt, kappa=dynamics.kappa)
    v = 0 if v_BSD is None else v_BSD
    e = x_BSD - params["mu"]
    new_v = c + alpha * (v - c) - beta * e + s_D
    return x_BSD + dynamics.dt * gate * new_v, new_v


def step(params, from_context_BSQC, x_BSD, v_BSD, s_D, *, dynamics: Dynamics):
    """One step. Returns (x', v'), and (r, rms(e)), which `dynamics_vjp` keeps for the gradient.

    A velocity of None is zero, and leaves out the product `v Wv`.
    """
    narrow = [None if a is None else a.astype(dynamics.dtype) for a in (x_BSD, v_BSD)]
    rms_BS1 = rms_error(x_BSD, params["mu"])
    # On a GPU, what makes x and v also makes what this step reads of them.
    x_BSD, v_BSD, narrow, rms_BS1 = written((x_BSD, v_BSD, narrow, rms_BS1))
    r_BSQC = controller_hidden(params, from_context_BSQC, *narrow)
    new = move(params, r_BSQC, rms_BS1, x_BSD, v_BSD, s_D, dynamics=dynamics)
    return new, (r_BSQC, rms_BS1)


@jax.named_scope("integrator_forward")
def run(
    params, from_context_BSQC, x_BSD, s_TD, *, dynamics: Dynamics, unroll: bool = False
) -> jax.Array:
    """The state `x_T` after T steps from the state `x_0 = x` and the velocity `v_0 = 0`.

    `unroll` compiles the steps as straight code, not as a loop.
    """

    def body(xv, s_D):
        return step(params, from_context_BSQC, *xv, s_D, dynamics=dynamics)[0], None

    # The first step stands outside the scan: its velocity of None saves a product.
    xv, _ = step(params, from_context_BSQC, x_BSD, None, s_TD[0], dynamics=dynamics)
    (x_BSD, _), _ = jax.lax.scan(body, xv, s_TD[1:], unroll=unroll)
    return x_BSD


def run_until(params, from_context_BSQC, x_BSD, s_TD, *, dynamics: Dynamics, tol: float):
    """`run`, in which a token stops after its first step with `rms(x' - x) < tol`, over D.

    The loop ends when every token has stopped, or after T steps. A token that has stopped keeps its
    `x`, whatever the others do. There is no gradient: JAX refuses to differentiate the loop.

    Returns:
      The last states [B, S, D]; and how many steps each token took, 1 to T, int32 [B, S].
    """

    def take_step(x_BSD, v_BSD, s_D, moving_BS):
        (new_x, new_v), _ = step(params, from_context_BSQC, x_BSD, v_BSD, s_D, dynamics=dynamics)
        rms_BS = jnp.sqrt(jnp.mean((new_x - x_BSD) ** 2, axis=-1))
        new_x = jnp.where(moving_BS[..., None], new_x, x_BSD)
        return new_x, new_v, moving_BS & ~(rms_BS < tol)

    def unfinished(carry):
        t, *_, moving_BS, _ = carry
        return (t < len(s_TD)) & jnp.any(moving_BS)

    def body(carry):
        t, x_BSD, v_BSD, moving_BS, steps_BS = carry
        return t + 1, *take_step(x_BSD, v_BSD, s_TD[t], moving_BS), steps_BS + moving_BS

    all_BS = jnp.ones(x_BSD.shape[:2], bool)
    first = take_step(x_BSD, None, s_TD[0], all_BS)  # outside the loop, as in `run`
    carry = (1, *first, all_BS.astype(jnp.int32))
    _, x_BSD, _, _, steps_BS = jax.lax.while_loop(unfinished, body, carry)
    return x_BSD, steps_BS
