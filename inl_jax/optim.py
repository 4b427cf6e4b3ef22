"""AdamW under warmup-cosine, float32 master weights, and gradient accumulation.

Order, from the outside: `MultiSteps` (only where an update has several micro-batches), masters
(only for 16-bit parameters), then clip, AdamW, schedule. Gradients enter in float32.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from inl_jax.config import TrainConfig


class NormState(NamedTuple):
    """The global norm of the last gradient."""

    grad_norm: jax.Array


class MasterState(NamedTuple):
    """Float32 copies of 16-bit parameters, and the state of the optimizer that moves them."""

    masters: Any
    inner: Any


def learning_rate_schedule(config: TrainConfig, num_steps: int) -> optax.Schedule:
    """Linear warmup from 0, then cosine to `final_lr_fraction` of the peak at `num_steps`."""
    o = config.optim
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=o.learning_rate,
        warmup_steps=o.warmup_steps,
        decay_steps=num_steps,
        end_value=o.learning_rate * o.final_lr_fraction,
    )


def decay_mask(params: Any) -> Any:
    """True for the leaves that weight decay applies to: kernels and the embedding."""

    def decays(path, _):
        return path[-1].key.endswith(("kernel", "embedding"))

    return jax.tree_util.tree_map_with_path(decays, params)


def record_norm() -> optax.GradientTransformation:
    """Passes gradients on unchanged and keeps their global norm as `grad_norm` in its state."""

    def init(params):
        return NormState(jnp.zeros((), optax.tree.dtype(params, "lowest")))

    def update(updates, state, params=None):
        del state, params
        return updates, NormState(optax.tree.norm(updates))

    return optax.GradientTransformation(init, update)


def with_float32_masters(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Runs `inner` on float32 master weights and lands the parameters on the masters' rounding.

    Added to a bfloat16 weight, an AdamW update at a small learning rate is below half a unit in
    the last place and vanishes. Here updates add up in the masters, and the emitted update takes
    each parameter to `bfloat16(master)`.
    """

    def init(params):
        masters = optax.tree.cast(params, jnp.float32)
        return MasterState(masters, inner.init(masters))

    def update(updates, state, params):
        updates, inner_state = inner.update(updates, state.inner, state.masters)
        masters = optax.apply_updates(state.masters, updates)

        def landing(master, param):
            return master.astype(param.dtype).astype(jnp.float32) - param.astype(jnp.float32)

        return jax.tree.map(landing, masters, params), MasterState(masters, inner_state)

    return optax.GradientTransformation(init, update)


def make_optimizer(config: TrainConfig, num_steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of `num_steps` updates. Feed it float32 gradients."""
    o = config.optim
    optimizer = optax.chain(
        record_norm(),
        optax.clip_by_global_norm(o.clip_norm),
        optax.adamw(
            learning_rate_schedule(config, num_steps),
            b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, mask=decay_mask,
        ),
    )  # fmt: skip
    if config.model.param_dtype == "bfloat16":
        optimizer = with_float32_masters(optimizer)
    if config.accumulate_steps > 1:
        wide = jnp.promote_types(jnp.float32, config.model.param_dtype)
        optimizer = optax.MultiSteps(
            optimizer, config.accumulate_steps, accumulator_dtype=wide
        ).gradient_transformation()
    return optimizer
