"""The smallest change of a config that makes a run fit."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from jax.sharding import Mesh

from inl_jax.config import InputError, TrainConfig, with_fields
from inl_jax.limits import host_memory
from inl_jax.parallel.sharding import batch_shards, fit_to_mesh, make_mesh
from inl_jax.planning.memory import memory_needed
from inl_jax.planning.recipe import choose
from inl_jax.training.state import make_layout


def smallest_change(
    config: TrainConfig,
    mesh: Mesh,
    usable: float,
    *,
    shared: bool = False,
    host: float = math.inf,
) -> dict[str, Any] | None:
    """The smallest change that makes a run fit, as dotted fields; None if no known change does.

    Cheap changes are tried first and those that change the arithmetic last. Each is tried alone,
    then together with the earlier ones that do not cost memory; of those, it keeps only the ones
    that are needed.

    Args:
      config: the run, as asked or fitted to `mesh`.
      mesh: its devices.
      usable: bytes that it may take of each device.
      shared: whether host memory is the devices' own memory, as it is for CPUs.
      host: bytes of host memory that it may take.
    """
    devices, before = mesh.devices.ravel().tolist(), []

    def needs(changes: list[dict[str, Any]]) -> float:
        try:
            changed = with_fields(config, _merged(changes))
            mesh = make_mesh(changed.mesh, devices=devices)
            layout = make_layout(changed, mesh)
            changed = choose(fit_to_mesh(changed, mesh), mesh, layout, usable, shared=shared)
            needed = memory_needed(changed, mesh, layout)
        except InputError:  # does not divide over the mesh, or contradicts another field
            return math.inf
        if needed.host_bytes * len(mesh.local_devices) > host:
            return math.inf
        return needed.device_bytes + shared * needed.host_bytes

    for change in _changes(config, mesh):
        if needs([change]) <= usable:
            return change
        if needs([*before, change]) > needs(before):
            continue
        before.append(change)
        if needs(before) <= usable:
            for other in before[:-1]:
                without = [kept for kept in before if kept is not other]
                before = without if needs(without) <= usable else before
            return _merged(before)
    return None


def memory_advice(config: TrainConfig, mesh: Mesh, usable: float, *, shared: bool = False) -> str:
    """What to do if a run does not fit here: `add --model.remat block`; as `smallest_change`."""
    if change := smallest_change(config, mesh, usable, shared=shared, host=host_memory()):
        return f"add {as_flags(change)}"
    return "use more devices (mesh.fsdp), a shorter data.seq_len or a smaller model"


def as_flags(fields: Mapping[str, Any]) -> str:
    """Dotted fields as a command line takes them: `--model.remat block --seed 1`."""
    return " ".join(f"--{name} {value}" for name, value in fields.items())


def _merged(changes: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: value for change in changes for name, value in change.items()}


def _changes(config: TrainConfig, mesh: Mesh) -> Iterator[dict[str, Any]]:
    """Changes that save memory, the cheapest first."""
    # As many micro-batches as there can be: each device has one sequence at a time.
    yield {"accumulate_steps": config.batch_size // batch_shards(mesh)}
    yield {"model.remat": "block"}
    if config.model.num_iterations > 1:
        yield {"model.integrator_segment": -(-config.model.num_iterations // 2)}
        yield {"model.integrator_chunk": -(-config.data.seq_len // 2)}
    if mesh.size > 1:
        yield {"mesh.data": 1, "mesh.fsdp": mesh.size, "mesh.tensor": 1}
    yield {"optim.state_memory": "pinned_host"}
    if config.model.param_dtype == "bfloat16":
        yield {"optim.accumulator_dtype": "bfloat16"}
        yield {"optim.moment_dtype": "bfloat16", "optim.rounding": "stochastic"}
        yield {"optim.optimizer": "adafactor", "optim.rounding": "stochastic"}
