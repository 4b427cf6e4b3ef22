"""What the integrator does: measured in every layer and iteration, for every token.

A forward pass keeps the inputs (h, x) of every integrator. From them the steps of
`model/dynamics.py` run once more, one layer at a time, and each is measured. No trajectory is kept.

Shapes: B batch, S sequence, D width, L layers, T iterations, Q controllers, C controller width.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from inl_jax.config import ModelConfig
from inl_jax.data.batches import eval_batches
from inl_jax.data.corpus import Corpus
from inl_jax.model.dynamics import (
    Dynamics,
    coefficients,
    complete,
    controller_outputs,
    excitation,
    hidden_from_context,
    rms_error,
    step,
)
from inl_jax.model.language_model import INLModel, by_layer
from inl_jax.model.layers import at_least_float32, compute_dtype
from inl_jax.parallel.processes import call_together
from inl_jax.parallel.sharding import fetch, on

# Of one token in one iteration, which takes the state x to x':
QUANTITIES = {
    "rms_error": "rms(x' - mu), over the channels",
    "rms_step": "rms(x' - x), over the channels",
    "alpha": "alpha, mean over the channels",
    "beta": "beta, mean over the channels",
    "gate": "gate, mean over the channels",
    "stiffness": "dt gate beta, the largest of the channels",
    "cosine": "cosine between x' - x and the step before; NaN in the first iteration",
}


def watch_tokens(
    config: ModelConfig, params: Any, tokens_BS, *, mesh: Mesh | None = None
) -> dict[str, np.ndarray]:
    """`QUANTITIES` of every token, float32 [L, T, B, S] each; empty if T is 0.

    Args:
      config: the architecture.
      params: its parameters; if there is a mesh, sharded over it.
      tokens_BS: ids from 0 up to the vocabulary's size, the same on every process.
      mesh: from `make_mesh`; None for a single device. Every device computes all rows.
    """
    if config.num_iterations == 0:
        return {}
    with on(mesh, split_rows=False):
        watched = call_together(_watch, config, params, np.asarray(tokens_BS, np.int32))
        return {name: fetch(watched[name]) for name in QUANTITIES}


def measure_dynamics(
    config: ModelConfig, params: Any, tokens_BS, *, mesh: Mesh | None = None
) -> dict[str, list[list[float | None]]]:
    """`QUANTITIES` over all tokens, [L][T]: the largest stiffness, and the mean of the others.

    The arguments are those of `watch_tokens`. The cosine of the first iteration is None. Without
    iterations the result is empty.
    """
    return over_tokens(watch_tokens(config, params, tokens_BS, mesh=mesh))


def over_tokens(watched: dict[str, np.ndarray]) -> dict[str, list[list[float | None]]]:
    """What `measure_dynamics` gives, from arrays [L, T, ...] of `watch_tokens`."""

    def reduced(name: str, values_LTX: np.ndarray) -> list[list[float | None]]:
        values = values_LTX.reshape(*values_LTX.shape[:2], -1).astype(np.float64)
        found_LT = values.max(axis=-1) if name == "stiffness" else values.mean(axis=-1)
        return [[None if math.isnan(a) else a for a in layer] for layer in found_LT.tolist()]

    return {name: reduced(name, values) for name, values in watched.items()}


def fixed_batch(
    corpus: Corpus, config: ModelConfig, *, max_rows: int = 4, max_tokens: int = 128
) -> np.ndarray:
    """A few tokens of the validation split, the same each time, without padding: int32 [B, S].

    Args:
      corpus: prepared tokens; their validation split is not empty.
      config: the architecture, whose longest sequence limits S.
      max_rows: sequences, B, spread evenly over the split.
      max_tokens: tokens of a sequence, S.
    """
    S = min(max_tokens, config.max_seq_len)
    windows = eval_batches(corpus, seq_len=S, batch_size=max_rows, max_sequences=max_rows)
    batch = next(windows)
    length_B = batch.weights.sum(axis=1).astype(int)
    # A window may end with the split: only the longest ones count.
    return batch.inputs[length_B == length_B.max(), : length_B.max()]


@functools.partial(jax.jit, static_argnames="config")
def _watch(config: ModelConfig, params, tokens_BS) -> dict[str, jax.Array]:
    amplitude = config.excitation_amplitude
    _, kept = INLModel(config).apply(
        {"params": params}, tokens_BS, None, None, amplitude, mutable="intermediates"
    )
    of_integrators = functools.partial(by_layer, config, part="integrator")
    ((h_LBSD, x_LBSD),) = of_integrators(kept["intermediates"]["blocks"])["inputs"]
    dynamics = Dynamics(config.dt, config.kappa, compute_dtype(config))

    def watch_layer(inputs):
        return watch_steps(
            *inputs, amplitude=amplitude, num_iterations=config.num_iterations, dynamics=dynamics
        )[1]

    return jax.lax.map(watch_layer, (of_integrators(params["blocks"]), h_LBSD, x_LBSD))


def watch_steps(
    params, h_BSD, x_BSD, *, amplitude, num_iterations: int, dynamics: Dynamics
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The last state of `integrate` with these arguments, and `QUANTITIES` of its steps [T, B, S].

    Args:
      params: of one layer, as declared by `Integrator`.
      h_BSD: the context.
      x_BSD: the initial state.
      amplitude: the excitation's A.
      num_iterations: T, at least 1.
      dynamics: constants of a step.
    """
    x_BSD = x_BSD.astype(at_least_float32(x_BSD))
    params = complete(jax.tree.map(lambda p: p.astype(x_BSD.dtype), params))
    from_context_BSQC = hidden_from_context(params, h_BSD, dtype=dynamics.dtype)
    s_TD = excitation(
        params["gamma"], params["phi"], amplitude=amplitude, num_iterations=num_iterations
    )

    def body(carry, s_D):
        x_BSD, v_BSD, step_before_BSD = carry
        (new_x, new_v), (r_BSQC, rms_BS1) = step(
            params, from_context_BSQC, x_BSD, v_BSD, s_D, dynamics=dynamics
        )
        o = controller_outputs(params, r_BSQC)
        alpha, beta, gate, _ = coefficients(o, rms_BS1, dt=dynamics.dt, kappa=dynamics.kappa)
        step_BSD = new_x - x_BSD
        found = {
            "rms_error": rms_error(new_x, params["mu"])[..., 0],
            "rms_step": _rms(step_BSD),
            "alpha": alpha.mean(axis=-1),
            "beta": beta.mean(axis=-1),
            "gate": gate.mean(axis=-1),
            "stiffness": dynamics.dt * (gate * beta).max(axis=-1),
            "cosine": _cosine(step_BSD, step_before_BSD),
        }
        return (new_x, new_v, step_BSD), {n: a.astype(jnp.float32) for n, a in found.items()}

    # The first step as in `dynamics.run`. The zero vector before it has no direction: NaN.
    carry, first = body((x_BSD, None, jnp.zeros_like(x_BSD)), s_TD[0])
    carry, later = jax.lax.scan(body, carry, s_TD[1:])
    watched = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, later)
    return carry[0], watched


def _rms(a_BSD) -> jax.Array:
    return jnp.sqrt(jnp.mean(a_BSD * a_BSD, axis=-1))


def _cosine(a_BSD, b_BSD) -> jax.Array:
    """NaN if either is zero."""
    return jnp.mean(a_BSD * b_BSD, axis=-1) / (_rms(a_BSD) * _rms(b_BSD))
