"""How fast can an H100 run the training step that XLA compiles for it? A prediction.

python benchmarks/cuda_program.py --config C [--section.field value ...] [--json]

Compiles the step for one H100, without one, and reads its kernels (benchmarks/hlo.py): as it is
with the integrator in XLA (xla), with the integrator's own kernels (mosaic), and without the
integrator (no_integrator). A kernel takes as long as its bytes at 3.0 TB/s or its matrix products
at 790 TFLOP/s, whichever is longer. Two bounds are given separately: with launches, at 1.5 us each;
and with the L2 cache, of which the integrator's kernels read their weights again in every program,
at 5.5 TB/s. What XLA's kernels read again is not known, and XLA cannot choose kernels by timing
them here: ratios deserve more trust than figures.
"""

import importlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import ptxas
from harness import Report, config_and_flags, main, shown
from hlo import Array, Kernel, kernels, parse

from inl_jax.config import InputError, TrainConfig, with_fields
from inl_jax.console import say
from inl_jax.model.platform.device import H100, made_for
from inl_jax.parallel.sharding import fit_to_mesh, make_mesh
from inl_jax.planning.cost import flops_per_token
from inl_jax.planning.hardware import find_gpu
from inl_jax.planning.memory import compiled_bytes
from inl_jax.planning.programs.xla import compile_abstractly, use_no_device
from inl_jax.planning.recipe import choose
from inl_jax.terminal.command_line import Parser
from inl_jax.training.state import make_layout

# What kernels of an H100 reach; data sheet: 3.35 TB/s, 989 TFLOP/s, and nothing about the L2 cache.
# Assumed, as the launch is.
CONSTANTS = {
    "bytes_per_second": 3.0e12,
    "flops_per_second": 790e12,
    "seconds_per_launch": 1.5e-6,
    "l2_bytes_per_second": 5.5e12,
}

VARIANTS = {
    "xla": {"model.integrator_kernel": "xla"},
    "mosaic": {"model.integrator_kernel": "mosaic"},
    "no_integrator": {"model.num_iterations": 0},
}


def cuda_program(parser: Parser, argv: Sequence[str]) -> Report:
    config, _ = config_and_flags(parser, argv)
    use_no_device("cuda")
    record, rows = dict(CONSTANTS), []
    for name, fields in VARIANTS.items():
        say(f"compiling {name}")
        try:
            with ptxas.reports() as usages:
                variant, found, device_bytes = compiled(with_fields(config, fields))
        except InputError as error:
            if name != "mosaic":
                raise
            say(f"mosaic: {error}")
            record[name] = None
            continue
        record[name] = roofline(variant, found) | {
            "device_bytes": device_bytes,
            "ptxas": [usage._asdict() for usage in usages],
        }
        rows += [{"variant": name} | row for row in by_loop(variant, found)]
    notes = [f"{name}: {in_words(record[name])}" for name in VARIANTS]
    assumed = (
        "predicted; assumed: {:g} bytes/s, {:g} FLOP/s, {:g} s per launch, {:g} bytes/s of the L2"
    )
    return Report(record, rows, [*notes, assumed.format(*CONSTANTS.values())])


def compiled(config: TrainConfig) -> tuple[TrainConfig, list[Kernel], int]:
    """The config as it would run on one H100, its step's kernels, and bytes of device memory."""
    with made_for(H100):
        mesh = make_mesh(config.mesh, devices=jax.devices("cpu"))
        config = fit_to_mesh(config, mesh)
        layout = make_layout(config, mesh)
        config = choose(config, mesh, layout, find_gpu("h100").usable_memory)
        program = compile_abstractly(config, mesh, layout, "cuda")
    device_bytes, _ = compiled_bytes(program.memory)
    return config, kernels(parse(program.text), mosaic_bytes), device_bytes


def mosaic_bytes(op_name: str, operand: Array) -> tuple[int, int]:
    """Bytes that one of the integrator's kernels moves and reads again, by its own definition."""
    name = "backward" if "integrator_backward" in op_name else "forward"
    module = importlib.import_module(f"inl_jax.model.mosaic.{name}")
    return module.bytes_moved(*operand.dims), module.bytes_read_again(*operand.dims)


# --- the roofline


def roofline(config: TrainConfig, found: list[Kernel]) -> dict[str, Any]:
    """The predicted speed of a step, and what its integrator moves."""
    tokens = config.batch_size * config.data.seq_len
    seconds = sum(k.times * least_seconds(k) for k in found)
    launches = sum(k.times for k in found)
    flops = 3 * tokens * flops_per_token(config.model, config.data.seq_len)
    with_launches = seconds + launches * CONSTANTS["seconds_per_launch"]
    with_l2 = sum(k.times * max(least_seconds(k), l2_seconds(k)) for k in found)
    return {
        "us_per_token": 1e6 * seconds / tokens,
        "us_per_token_with_launches": 1e6 * with_launches / tokens,
        "us_per_token_with_l2": 1e6 * with_l2 / tokens,
        "tokens_per_second": tokens / seconds,
        "mfu": flops / seconds / find_gpu("h100").peak_flops,
        "kernels": launches,
        "kernels_by_kind": by_kind(found),
        "kb_per_token_iteration_forward": kb_per_token_iteration(config, found, "forward"),
        "kb_per_token_iteration_backward": kb_per_token_iteration(config, found, "backward"),
    }


def least_seconds(kernel: Kernel) -> float:
    """How long one run of a kernel takes at least, if it reads nothing again."""
    moving = kernel.num_bytes / CONSTANTS["bytes_per_second"]
    return max(moving, kernel.flops / CONSTANTS["flops_per_second"])


def l2_seconds(kernel: Kernel) -> float:
    """How long what one run of a kernel moves takes through the L2 cache."""
    return (kernel.num_bytes + kernel.bytes_again) / CONSTANTS["l2_bytes_per_second"]


def kb_per_token_iteration(config: TrainConfig, found: list[Kernel], which: str) -> float | None:
    """Thousands of bytes that a pass of the integrator moves per token and iteration.

    A pass begins before its first iteration and ends after its last. If the forward pass is
    recomputed, this is the mean of both forward passes. None without the integrator.
    """
    mine = [k for k in found if integrator_pass(k) == which]
    if not mine:
        return None
    passes = len({"rematted_computation" in k.op_name for k in mine}) if which == "forward" else 1
    tokens = config.batch_size * config.data.seq_len
    iterations = config.model.num_layers * config.model.num_iterations
    return sum(k.times * k.num_bytes for k in mine) / 1000 / tokens / iterations / passes


def integrator_pass(kernel: Kernel) -> str | None:
    """The pass of the integrator that a kernel belongs to: "forward", "backward" or None."""
    if "integrator_backward" in kernel.op_name:
        return "backward"
    return "forward" if "integrator_forward" in kernel.op_name else None


def by_kind(found: list[Kernel]) -> dict[str, int]:
    """How often the step runs kernels of each kind, the most frequent first."""
    counts = Counter()
    for kernel in found:
        counts[kernel.kind] += kernel.times
    return dict(counts.most_common())


# --- the table


def by_loop(config: TrainConfig, found: list[Kernel]) -> list[dict[str, Any]]:
    """A row for each loop of a program, without the loops inside it, and one for all."""
    tokens = config.batch_size * config.data.seq_len
    groups = defaultdict(list)
    for kernel in found:
        where = [f"{loop.name} x{loop.trips}" for loop in kernel.loops]
        groups[" / ".join(where) or "outside loops"].append(kernel)
    return [
        {
            "loop": loop,
            "kernels": sum(k.times for k in of_loop),
            "kb_per_token": sum(k.times * k.num_bytes for k in of_loop) / tokens / 1000,
            "mflop_per_token": sum(k.times * k.flops for k in of_loop) / tokens / 1e6,
            "us_per_token": sum(k.times * least_seconds(k) for k in of_loop) / tokens * 1e6,
        }
        for loop, of_loop in [*groups.items(), ("all", found)]
    ]


def in_words(values: dict[str, Any] | None) -> str:
    """The roofline of a variant in one line."""
    if values is None:
        return "cannot be compiled"
    numbers = {name: x for name, x in values.items() if isinstance(x, int | float)}
    parts = [f"{name} {shown(name, x)}" for name, x in numbers.items()]
    for usage in values["ptxas"]:
        parts.append(f"{usage['registers']} registers, {usage['spilled_bytes']} bytes spilled")
    return ", ".join(parts)


if __name__ == "__main__":
    main(cuda_program)
