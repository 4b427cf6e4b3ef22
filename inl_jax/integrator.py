"""The integrator neuron layer: T steps of a small, damped, driven dynamical system per token.

A state `x` and a velocity `v` are pulled towards a learned equilibrium `mu`. Four controllers,
small networks that see (context, x, v), choose at every step how much velocity is kept (`alpha`),
how strong the pull is (`beta`), how far the state moves (`gate`) and what velocity to blend in
(`candidate`). A deterministic harmonic excites the system.

Shapes: B batch, S sequence, D model width, C controller width, T iterations, Q the four
controllers in the order of `CONTROLLERS`.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from inl_jax.config import ModelConfig

CONTROLLERS = ("alpha", "beta", "gate", "candidate")


def excitation(gamma_D, phi_D, *, amplitude, num_iterations: int) -> jax.Array:
    """The harmonic drive `A sin(gamma t + phi)` of every iteration, [T, D]."""
    t_T1 = jnp.arange(num_iterations, dtype=gamma_D.dtype)[:, None]
    return amplitude * jnp.sin(gamma_D * t_T1 + phi_D)


def coefficients(o_QBSD, x_BSD, mu_D, *, dt: float, kappa: float):
    """The coefficients (alpha, beta, gate, candidate) of one step from the controllers' outputs.

    ```
    beta  = min(softplus(o_beta), 2 / dt)
    alpha = sigmoid(o_alpha) * (1 - exp(-kappa * rms(x - mu)))        rms over D
    gate  = sigmoid(o_gate);  candidate = o_candidate
    ```
    The bound on beta keeps `dt * gate * beta < 2 (1 + alpha)`, without which the step diverges.
    """
    o_alpha, o_beta, o_gate, candidate = o_QBSD
    alpha = jax.nn.sigmoid(o_alpha)
    if not math.isinf(kappa):  # at inf the factor is 1, and its derivative inf * 0
        e_BSD = x_BSD - mu_D
        # `tiny` keeps the gradient finite (and zero) at x == mu.
        tiny = jnp.finfo(x_BSD.dtype).tiny
        rms_BS1 = jnp.sqrt(jnp.mean(e_BSD * e_BSD, axis=-1, keepdims=True) + tiny)
        alpha = alpha * -jnp.expm1(-kappa * rms_BS1)
    beta = jnp.minimum(jax.nn.softplus(o_beta), 2 / dt)
    return alpha, beta, jax.nn.sigmoid(o_gate), candidate


def step(params, from_context_BSQC, x_BSD, v_BSD, s_D, *, dt: float, kappa: float, dtype):
    """One integrator step, (x, v) -> (x', v').

    ```
    r  = relu(h W_h + x W_x + v W_v + b);  o = r W_o + b_o           for each controller
    v' = alpha v + (1 - alpha) c - beta (x - mu) + s
    x' = x + dt gate v'
    ```

    Args:
      params: as declared by `Integrator`, float32 (float64 where the model is).
      from_context_BSQC: `h W_h + b`, the same at every iteration.
      x_BSD: state, float32.
      v_BSD: velocity, float32.
      s_D: this iteration's excitation.
      dt: time step.
      kappa: sharpness of alpha's fall near equilibrium; inf for none.
      dtype: type of the matrix products.
    """
    state = jnp.concatenate([x_BSD, v_BSD], axis=-1).astype(dtype)
    hidden = jnp.einsum("bse,eqc->bsqc", state, params["state_kernel"].astype(dtype))
    r_BSQC = jax.nn.relu(hidden + from_context_BSQC)
    o_QBSD = jnp.einsum("bsqc,qcd->qbsd", r_BSQC, params["output_kernel"].astype(dtype))
    o_QBSD = o_QBSD.astype(x_BSD.dtype) + params["output_bias"][:, None, None, :]
    alpha, beta, gate, candidate = coefficients(o_QBSD, x_BSD, params["mu"], dt=dt, kappa=kappa)
    v_BSD = alpha * v_BSD + (1 - alpha) * candidate - beta * (x_BSD - params["mu"]) + s_D
    return x_BSD + dt * gate * v_BSD, v_BSD


def integrate(params, h_BSD, x_BSD, *, amplitude, num_iterations: int, dt: float, kappa: float,
              dtype) -> jax.Array:  # fmt: skip
    """Runs `num_iterations` steps from state `x` and velocity 0; returns the last state.

    Args:
      params: as declared by `Integrator`, in any float type.
      h_BSD: the context, constant over the iterations.
      x_BSD: the initial state.
      amplitude: excitation amplitude A, a number or a traced scalar.
      num_iterations: T.
      dt: time step.
      kappa: sharpness of alpha's fall near equilibrium; inf for none.
      dtype: type of the matrix products. The state stays in float32 (float64 if `x` is): in
        bfloat16 the dynamics stagnate.
    """
    state_dtype = jnp.promote_types(jnp.float32, x_BSD.dtype)
    # Cast outside the scan, so that gradients add up over the iterations in this type.
    params = jax.tree.map(lambda p: p.astype(state_dtype), params)
    x_BSD = x_BSD.astype(state_dtype)
    from_context_BSQC = jnp.einsum(
        "bsd,dqc->bsqc", h_BSD.astype(dtype), params["context_kernel"].astype(dtype)
    ) + params["hidden_bias"].astype(dtype)
    s_TD = excitation(
        params["gamma"], params["phi"], amplitude=amplitude, num_iterations=num_iterations
    )

    def body(carry, s_D):
        x, v = carry
        return step(params, from_context_BSQC, x, v, s_D, dt=dt, kappa=kappa, dtype=dtype), None

    (x_BSD, _), _ = jax.lax.scan(body, (x_BSD, jnp.zeros_like(x_BSD)), s_TD)
    return x_BSD


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
            "mu": (init.zeros, (D,), ("embed",)),
            "gamma": (lambda *a: 1 + init.normal(0.1)(*a), (D,), ("embed",)),
            "phi": (init.uniform(2 * math.pi), (D,), ("embed",)),
            "context_kernel": (hidden_init, (D, Q, C), ("embed", None, "controller")),
            "state_kernel": (hidden_init, (2 * D, Q, C), ("embed", None, "controller")),
            "hidden_bias": (init.zeros, (Q, C), (None, "controller")),
            "output_kernel": (init.normal(0.01), (Q, C, D), (None, "controller", "embed")),
            "output_bias": (_output_bias_init, (Q, D), (None, "embed")),
        }
        params = {
            name: self.param(
                name, nn.with_logical_partitioning(fn, axes), shape, jnp.dtype(c.param_dtype)
            )
            for name, (fn, shape, axes) in declared.items()
        }
        return integrate(
            params, h_BSD, x_BSD, amplitude=amplitude, num_iterations=c.num_iterations, dt=c.dt,
            kappa=c.kappa, dtype=dtype,
        )  # fmt: skip
