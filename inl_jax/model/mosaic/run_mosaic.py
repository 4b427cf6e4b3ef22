"""`dynamics.run` by kernels, with its gradient, and the choice between the two.

Pallas takes 0.2 s to import, so what uses it is imported when a kernel is chosen.

Shapes: as in `dynamics.py`; N tokens, padded to a multiple of 64, H = Q C.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from inl_jax.checks import require
from inl_jax.model.dynamics import Dynamics, rms_error
from inl_jax.model.dynamics_vjp import TRAJECTORY
from inl_jax.model.params import current_channel_shards
from inl_jax.model.platform.device import current_device
from inl_jax.model_config import ModelConfig


def integrator_kernel(config: ModelConfig) -> Literal["xla", "mosaic"]:
    """What `config.integrator_kernel` names; auto is xla, because no GPU has run the kernels yet.

    Raises:
      InputError: the kernels are asked for, but are not made for this device or this model, or the
        current mesh shards D.
    """
    if config.integrator_kernel != "mosaic":
        return "xla"
    from inl_jax.model.mosaic.forward import COLUMNS
    from inl_jax.model.mosaic.tiles import WIDTH

    device, needs = current_device(), "model.integrator_kernel=mosaic needs"
    instead = "or set model.integrator_kernel xla"
    require(
        device.capability is not None and device.capability[0] == 9,
        f"{needs} a Hopper GPU, compute capability 9.x, not {device}: run it on one, {instead}",
    )
    for name, wanted in {
        "compute_dtype": ("auto", "bfloat16"),
        "controller_width": (WIDTH,),
        "integrator_gradient": ("lean",),
        "integrator_segment": (1,),
        "trajectory_dtype": ("float32",),
        "unroll": ("auto", "iterations"),
    }.items():
        value = getattr(config, name)
        require(
            value in wanted, f"{needs} model.{name}={wanted[-1]}, not {value}: set it, {instead}"
        )
    require(
        config.d_model % COLUMNS == 0,
        f"{needs} a multiple of {COLUMNS} as model.d_model, not {config.d_model}: set one, "
        f"{instead}",
    )
    shards = current_channel_shards()
    require(
        shards == 1,
        f"{needs} all of D on one device, not mesh.tensor={shards}: set mesh.tensor 1, {instead}",
    )
    return "mosaic"


def run_mosaic(params, from_context_BSQC, x_BSD, s_TD, dynamics: Dynamics) -> jax.Array:
    """`dynamics.run` with products in bfloat16 and a state in float32, by kernels."""
    from inl_jax.model.mosaic.tiles import ROWS

    N = math.prod(x_BSD.shape[:2])

    def by_tokens(a, width):
        return jnp.pad(a.reshape(N, width), [(0, -N % ROWS), (0, 0)])

    D, H = x_BSD.shape[-1], math.prod(from_context_BSQC.shape[2:])
    context_NH = by_tokens(from_context_BSQC, H)
    last_ND = _run(params, context_NH, by_tokens(x_BSD, D), s_TD, dynamics)
    return last_ND[:N].reshape(x_BSD.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _run(params, context_NH, x_ND, s_TD, dynamics: Dynamics):
    return _run_forward(params, context_NH, x_ND, s_TD, dynamics)[0]


@jax.named_scope("integrator_forward")
def _run_forward(params, context_NH, x_ND, s_TD, dynamics):
    from inl_jax.model.mosaic.forward import State, Weights, iteration

    dtype = dynamics.dtype
    D, H = len(params["mu"]), context_NH.shape[1]
    state_kernel_EDH = params["state_kernel"].astype(dtype).reshape(2, D, H)
    output_kernel_QCD = params["output_kernel"].astype(dtype)
    weights = Weights(
        output_kernel_QCD, state_kernel_EDH, params["output_bias"], params["mu"], context_NH
    )
    r_NH = jax.nn.relu(x_ND.astype(dtype) @ state_kernel_EDH[0] + context_NH)
    state = State(x_ND, None, r_NH, rms_error(x_ND, params["mu"])[:, 0])
    kept = []
    for s_D in s_TD:
        kept.append(state)
        state = State(
            *checkpoint_name(tuple(iteration(state, weights, s_D, dynamics=dynamics)), TRAJECTORY)
        )
    return state.x_ND, (params, s_TD, kept)


@jax.named_scope("integrator_backward")
def _run_backward(dynamics, residuals, dx_ND):
    from inl_jax.model.mosaic.backward import backward

    return backward(*residuals, dx_ND, dynamics=dynamics)


_run.defvjp(_run_forward, _run_backward)
