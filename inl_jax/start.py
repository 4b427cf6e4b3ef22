"""Where a run starts: from its newest checkpoint, from given weights, or from random ones."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from inl_jax.config import TrainConfig
from inl_jax.console import say
from inl_jax.curriculum import Read, read_so_far, resumed_position
from inl_jax.data.corpus import Corpus
from inl_jax.initial_weights import find_weights
from inl_jax.model.language_model import param_count
from inl_jax.parallel.processes import call_later
from inl_jax.parallel.sharding import shardings_of
from inl_jax.storage.checkpoint import Checkpoints
from inl_jax.storage.run_dir import read_config
from inl_jax.training.compile_options import compile_options
from inl_jax.training.metrics import read_metrics
from inl_jax.training.optim import learning_rates
from inl_jax.training.state import (
    Layout,
    TrainState,
    init_state,
    join_state,
    split_state,
    state_from_params,
)
from inl_jax.watch.progress import Stretch


class Start(NamedTuple):
    """Where a run starts or resumes."""

    step: int = 0  # updates done
    position: int = 0  # samples consumed
    stretch: Stretch = Stretch()  # the updates since the last evaluation
    read: Read = ()  # the phases of the samples


def say_rate_change(config: TrainConfig, step: int) -> None:
    """Says if a run that resumes after `step` has another learning rate than its last start had."""
    if step == 0 or 0 in (config.num_steps, (old := read_config(config.run_dir)).num_steps):
        return
    before = learning_rates(old.optim, old.num_steps)[min(step, old.num_steps - 1)]
    now = learning_rates(config.optim, config.num_steps)[step]
    if abs(now - before) > 1e-3 * before:
        say(
            f"the learning rate at update {step + 1} is {now:.2e}; by the config of the last start "
            f"it would be {before:.2e}"
        )


def restore_or_init(
    config: TrainConfig, layout: Layout, checkpoints: Checkpoints, corpus: Corpus
) -> tuple[Callable[[], TrainState], Start]:
    """What makes the state to start from when it is called, once; and where that is.

    A checkpoint is read at once, straight into its shardings. A program that makes the state is
    compiled in a thread, beside the training step; given weights are donated to it. Memory never
    holds two states.
    """
    found = checkpoints.restore(split_state(layout.state))
    if found is not None:
        say(f"resuming from update {found['step']} in {config.run_dir}")
        if not read_metrics(config.run_dir, up_to=found["step"]):
            say(
                f"WARNING: {config.run_dir}/metrics.jsonl holds no record of these updates: curves "
                "begin here, and patience counts anew"
            )
        saved = found["position"]
        read, stretch = read_so_far(saved, config, corpus), saved.get("stretch", ())
        position = resumed_position(saved, config, corpus)
        state = join_state(found)
        return lambda: state, Start(found["step"], position, Stretch(*stretch), read)
    shardings = shardings_of(layout.state)
    options = compile_options(shardings.step.mesh, param_count(config.model), once=True)
    if config.init_from:
        weights = find_weights(config.init_from, config.model)
        what, params = weights.read(config.model.param_dtype, shardings.params)
        say(f"starting from the weights of {config.init_from}, {what}")
        fresh = jax.jit(
            functools.partial(state_from_params, config=config),
            out_shardings=shardings,
            donate_argnums=0,
            compiler_options=options,
        )
        return call_later(fresh, params), Start()
    say(f"starting from random weights, seed {config.seed}, in {config.run_dir}")

    def fresh_state(seed):  # makes its key itself, which would be a program of its own
        return init_state(jax.random.key(seed), config=config)

    fresh = jax.jit(fresh_state, out_shardings=shardings, compiler_options=options)
    return call_later(fresh, np.uint32(config.seed)), Start()
