"""The recipe of a step: how many sequences at a time, and what the backward pass recomputes.

`accumulate_steps auto` and `model.remat auto` are chosen here, from the memory that the step is
estimated to need and the time that it is predicted to take. The loss, the gradients and the order
of the data are the same with every recipe, but for rounding (and for the draws of dropout).
"""

import math
from typing import NamedTuple

from jax.sharding import Mesh

from inl_jax.config import TrainConfig, with_fields
from inl_jax.console import plural, size
from inl_jax.model.platform.device import current_device
from inl_jax.parallel import processes
from inl_jax.parallel.sharding import batch_shards
from inl_jax.planning.memory import memory_found, memory_needed
from inl_jax.training.state import Layout

MARGIN = 1.2
"""A recipe fits if there is so many times its estimated memory. XLA asks for up to 10% more than
the estimate; and a GPU's program that needs more than 80% of the card, which is 87% of what JAX may
use, is recomputed in parts by XLA itself, at the cost of time (docs/memory.md)."""

ALIKE = 1.05
"""Of recipes whose predicted times are within this ratio of the fastest, the one that needs the
least memory is taken: the prediction cannot tell them apart."""


class Costs(NamedTuple):
    """What a step costs: for each token, in a unit of its own; for each micro-batch, in tokens."""

    rest: float  # forward and backward of all but the integrator
    iteration: float  # the same of one iteration
    iteration_again: float  # to recompute an iteration rather than keep it
    rest_kept: float  # to keep the rest rather than recompute it
    added: float  # to add up a micro-batch's gradients of weights
    launched: float  # to launch its kernels, at width 1: wider layers hide it


# Fitted to the bytes that XLA's CUDA program of the 3b moves (docs/memory.md), in microseconds.
GPU = Costs(20, 4.4, 0.45, 0.3, 780, 520 * 2048)
# Fitted to updates of 2,048 tokens on 2 cores, at widths 128 and 512. A token takes so long that
# the weights' gradients cost little beside it, and to compute again costs more than to read.
CPU = Costs(20, 4, 1, 0, 40, 0)


class Recipe(NamedTuple):
    """A way to compute the same update."""

    config: TrainConfig  # without auto
    num_bytes: int  # estimated, on each device
    time: float  # predicted, in a unit that all recipes of a run share


def is_open(config: TrainConfig) -> bool:
    """Whether a field of the recipe is auto."""
    return "auto" in (config.accumulate_steps, config.model.remat)


def choose(
    config: TrainConfig, mesh: Mesh, layout: Layout, memory: float, *, shared: bool = False
) -> TrainConfig:
    """`config` with the fastest recipe that fits in place of auto; other values stay.

    If none fits, it is the recipe that needs the least memory.

    Args:
      config: the run, fitted to `mesh`.
      mesh: from `make_mesh`.
      layout: from `make_layout`.
      memory: bytes that the run may take of each device.
      shared: whether host memory is the devices' own memory, as it is for CPUs.
    """
    return _chosen(recipes(config, mesh, layout, shared=shared), memory).config


def recipes(
    config: TrainConfig, mesh: Mesh, layout: Layout, *, shared: bool = False
) -> list[Recipe]:
    """All recipes that a run leaves open, from those that need less memory; as `choose`."""
    rows, steps = config.batch_size // batch_shards(mesh), [config.accumulate_steps]
    if steps == ["auto"]:
        steps = [k for k in range(1, rows + 1) if rows % k == 0]
    remats = [config.model.remat]
    if remats == ["auto"]:
        remats = ["none", "integrator", "block"]
        if config.model.integrator_gradient == "lean":  # autodiff would recompute all
            remats.append("all_but_integrator")
    found = []
    for fields in ({"accumulate_steps": k, "model.remat": r} for k in steps for r in remats):
        one = with_fields(config, fields)
        needed = memory_needed(one, mesh, layout)
        num_bytes = needed.device_bytes + shared * needed.host_bytes
        found.append(Recipe(one, num_bytes, predicted_time(one, mesh)))
    return sorted(found, key=lambda recipe: (recipe.num_bytes, recipe.time))


def predicted_time(config: TrainConfig, mesh: Mesh) -> float:
    """Time of an update, in the unit of `Costs`; no GPU has measured it.

    The exchange between devices is left out. It serves to compare the recipes of one run on the
    current device, and says nothing of other runs.

    Args:
      config: the run, without auto, fitted to `mesh`.
      mesh: from `make_mesh`.
    """
    c, costs = config.model, CPU if current_device().platform == "cpu" else GPU
    again = costs.iteration_again if c.remat in ("integrator", "block") else 0
    per_token = costs.rest + c.num_iterations * (costs.iteration + again)
    if c.remat in ("none", "integrator"):
        per_token += costs.rest_kept
    tokens = config.batch_size // batch_shards(mesh) * config.data.seq_len
    micro_batch = costs.added + costs.launched / c.d_model
    return per_token * (tokens + config.accumulate_steps * micro_batch)


def memory_of_each(mesh: Mesh) -> int:
    """Bytes of the smallest device, over all processes, which call it together."""
    return min(map(int, processes.gather(str(memory_found(mesh)[0]))))


def explain(
    asked: TrainConfig,
    config: TrainConfig,
    mesh: Mesh,
    layout: Layout,
    memory: float,
    *,
    shared: bool = False,
) -> str:
    """How a run was fitted to its devices, and why, in one line.

    Args:
      asked: the run as its config file and command line say.
      config: as it will run: fitted to `mesh`, its recipe chosen.
      mesh: from `make_mesh`.
      layout: from `make_layout`.
      memory: as `choose` had it, if `asked` has an auto.
      shared: as `choose` had it.
    """
    lines = []
    if asked.accumulate_steps not in ("auto", config.accumulate_steps):
        lines.append(
            f"accumulate_steps {asked.accumulate_steps} -> {config.accumulate_steps}, so that each "
            f"of {batch_shards(mesh)} devices has rows of every micro-batch"
        )
    if is_open(asked):
        lines.append(_explain_choice(asked, config, mesh, layout, memory, shared))
    return "; ".join(lines) or f"{_describe(config, mesh)}, as asked"


def _explain_choice(asked, config, mesh, layout, memory, shared) -> str:
    """The recipe that was chosen, and what the next faster one would need."""
    fields = {"accumulate_steps": asked.accumulate_steps, "model.remat": asked.model.remat}
    left_open = {name: value for name, value in fields.items() if value == "auto"}
    found = recipes(with_fields(config, left_open), mesh, layout, shared=shared)
    (mine,) = (recipe for recipe in found if recipe.config == config)
    line = " and ".join(f"{name.removeprefix('model.')} auto" for name in left_open)
    line += f": {_describe(config, mesh)}: "
    if mine.num_bytes > memory:
        return f"{line}needs {size(mine.num_bytes)}, and every other choice needs more"
    line += f"{size(mine.num_bytes)} of {size(memory)}"
    faster = [recipe for recipe in found if recipe.time < mine.time]
    if not faster:
        return f"{line}; none is predicted to be faster"
    fitting = [recipe for recipe in faster if MARGIN * recipe.num_bytes <= memory]
    other = min(fitting, key=lambda recipe: recipe.time, default=faster[0])
    line += f"; {_describe(other.config, mesh)} would need {size(other.num_bytes)}"
    if not fitting:
        return f"{line}, which leaves too little to spare"
    return f"{line} and be only {100 * (mine.time / other.time - 1):.2g}% faster (predicted)"


def _chosen(found: list[Recipe], memory: float) -> Recipe:
    """Of recipes in the order of their memory."""
    fitting = [recipe for recipe in found if MARGIN * recipe.num_bytes <= memory]
    fastest = min((recipe.time for recipe in fitting), default=math.inf)
    return next((recipe for recipe in fitting if recipe.time <= ALIKE * fastest), found[0])


def _describe(config: TrainConfig, mesh: Mesh) -> str:
    """`16 micro-batches of 4 sequences, remat block`."""
    number, shards = config.accumulate_steps, batch_shards(mesh)
    sequences = plural(config.batch_size // number // shards, "sequence")
    each = " on each device" if shards > 1 else ""
    return f"{plural(number, 'micro-batch')} of {sequences}{each}, remat {config.model.remat}"
