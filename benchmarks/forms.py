"""Forms of the integrator that the study tries and that the config has no field for.

A form changes a run by functions that return their argument unless it says otherwise. A form that
earns its cost gets a field; until then it stands here, so that its result can be repeated.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from inl_jax.config import ModelConfig
from inl_jax.model.dynamics import CONTROLLERS, Dynamics, excitation, hidden_from_context, step
from inl_jax.model.language_model import INLModel
from inl_jax.model.layers import compute_dtype
from inl_jax.planning.cost import flops_per_token

CLOSED = -1e9  # a gate's bias whose sigmoid and slope are 0
SMALL = 0.2  # in place of 1


def _unchanged(tree: Any) -> Any:
    return tree


def _no_penalty(config: ModelConfig, params: Any, ids_BS: jax.Array) -> float:
    return 0.0


def _own_depth(config: ModelConfig, update: int) -> int:
    return config.num_iterations


@dataclasses.dataclass(frozen=True)
class Form:
    """What a form changes."""

    init: Callable[[Any], Any] = _unchanged
    """The first parameters, from fresh ones."""
    tie: Callable[[Any], Any] = _unchanged
    """The gradients that the optimizer sees."""
    penalty: Callable[[ModelConfig, Any, jax.Array], Any] = _no_penalty
    """Added to the loss, from the parameters and the tokens [B, S]."""
    depth: Callable[[ModelConfig, int], int] = _own_depth
    """The number of iterations of an update, from its number."""
    flops: Callable[[ModelConfig, int], float] = flops_per_token
    """FLOPs of a forward pass per token, from the length of its sequence."""


# --- one integrator for all layers, and integrators in every other layer


def _of_integrators(change: Callable[[jax.Array], jax.Array]) -> Callable[[Any], Any]:
    """A change of the integrators' leaves [L, ...] in a tree of the whole model."""

    def changed(params):
        blocks = params["blocks"]
        integrators = jax.tree.map(change, blocks["integrator"])
        return params | {"blocks": blocks | {"integrator": integrators}}

    return changed


def _closed_in_every_other(params):
    """Closes the gates of every second layer: their integrators move and learn nothing."""
    blocks, integrator = params["blocks"], params["blocks"]["integrator"]
    bias_LQD = integrator["output_bias"].at[1::2, CONTROLLERS.index("gate")].set(CLOSED)
    return params | {"blocks": blocks | {"integrator": integrator | {"output_bias": bias_LQD}}}


def _flops_of_every_other(config: ModelConfig, seq_len: int) -> float:
    without = dataclasses.replace(config, num_iterations=0)
    return (flops_per_token(config, seq_len) + flops_per_token(without, seq_len)) / 2


# --- a scale in place of the integrator


def _of_the_scale(grads):
    """Leaves beta and the gate alone to learn, so that C 0 without excitation is `n (1 - s)`."""
    blocks, integrator = grads["blocks"], grads["blocks"]["integrator"]
    learns = [CONTROLLERS.index(name) for name in ("beta", "gate")]
    zeros = jax.tree.map(jnp.zeros_like, integrator)
    bias_LQD = zeros["output_bias"].at[:, learns].set(integrator["output_bias"][:, learns])
    return grads | {"blocks": blocks | {"integrator": zeros | {"output_bias": bias_LQD}}}


# --- other scales at the start


def _small_embedding(params):
    """Lets the embedding start at SMALL of its scale, and with it the stream and the logits."""
    return params | {"embedding": SMALL * params["embedding"]}


def _small_logits(params):
    """Lets the logits start at SMALL of their scale: a token's own, sqrt(D), is then about 2."""
    return params | {"final_norm_scale": SMALL * params["final_norm_scale"]}


# --- the published regularisers


def _trajectories(config: ModelConfig, params, ids_BS):
    """States and velocities of all integrators after each step, [L, T, B, S, D] each; and mu."""
    dynamics = Dynamics(config.dt, config.kappa, compute_dtype(config))
    amplitude, T = config.excitation_amplitude, config.num_iterations
    _, kept = INLModel(config).apply(
        {"params": params}, ids_BS, None, None, amplitude, mutable="intermediates"
    )
    (inputs,) = kept["intermediates"]["blocks"]["integrator"]["inputs"]

    def of_layer(layer):
        own, h_BSD, x_BSD = layer
        s_TD = excitation(own["gamma"], own["phi"], amplitude=amplitude, num_iterations=T)
        from_context = hidden_from_context(own, h_BSD, dtype=dynamics.dtype)

        def body(xv, s_D):
            xv, _ = step(own, from_context, *xv, s_D, dynamics=dynamics)
            return xv, xv

        return jax.lax.scan(body, (x_BSD, jnp.zeros_like(x_BSD)), s_TD)[1]

    integrators = params["blocks"]["integrator"]
    x_LTBSD, v_LTBSD = jax.lax.map(of_layer, (integrators, *inputs))
    return x_LTBSD, v_LTBSD, integrators["mu"]


def _regularised(mean: float, speed: float, energy: float):
    """The published losses: the mean state near mu, early states near mu, and slow states.

    mean    sum_i |mean(x_i) - mu_i|^2 / (1 + var(x_i)) over the channels, of the last states
    speed   sum_t exp(-t / T) mean |x_t - mu|
    energy  mean of v^2
    """

    def penalty(config: ModelConfig, params, ids_BS):
        x_LTBSD, v_LTBSD, mu_LD = _trajectories(config, params, ids_BS)
        last_LBSD, T = x_LTBSD[:, -1], x_LTBSD.shape[1]
        of_tokens = (1, 2)
        off_LD = (last_LBSD.mean(of_tokens) - mu_LD) ** 2
        of_mean = jnp.mean(off_LD / (1 + last_LBSD.var(of_tokens)))
        away_T = jnp.abs(x_LTBSD - mu_LD[:, None, None, None]).mean((0, 2, 3, 4))
        of_speed = jnp.sum(jnp.exp(-jnp.arange(T) / T) * away_T)
        return mean * of_mean + speed * of_speed + energy * jnp.mean(v_LTBSD**2)

    return penalty


# --- random depth


def _random_depth(config: ModelConfig, update: int) -> int:
    """1 to T, each as often; the same in every run."""
    return 1 + (update * 2654435761 % 2**32) * config.num_iterations // 2**32


def _flops_of_random_depth(config: ModelConfig, seq_len: int) -> float:
    depths = range(1, config.num_iterations + 1)
    each = [flops_per_token(dataclasses.replace(config, num_iterations=t), seq_len) for t in depths]
    return sum(each) / len(each)


FORMS = {
    "": Form(),
    "shared": Form(  # from one start and by one gradient, the layers stay equal
        init=_of_integrators(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape)),
        tie=_of_integrators(lambda leaf: jnp.broadcast_to(leaf.mean(0)[None], leaf.shape)),
    ),
    "every_other": Form(init=_closed_in_every_other, flops=_flops_of_every_other),
    "scale": Form(tie=_of_the_scale),
    "small_embedding": Form(init=_small_embedding),
    "small_logits": Form(init=_small_logits),
    "mean": Form(penalty=_regularised(0.1, 0, 0)),
    "speed": Form(penalty=_regularised(0, 0.1, 0)),
    "energy": Form(penalty=_regularised(0, 0, 0.01)),
    "random_depth": Form(depth=_random_depth, flops=_flops_of_random_depth),
}
