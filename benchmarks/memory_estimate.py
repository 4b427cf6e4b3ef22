"""How far is the estimate of a step's memory from what XLA's CUDA compiler says?

python benchmarks/memory_estimate.py --config C [--section.field value ...] [--sequences 1 2 4]
    [--remats block none] [--json]

Compiles the training step of one H100, without a GPU (inl_jax[cuda]), for micro-batches of so many
sequences and for each model.remat. All bytes are those of the whole step on the device.
"""

from collections.abc import Sequence
from typing import get_args

import jax
from harness import Report, config_and_flags, main

from inl_jax.config import TrainConfig, field_types, with_fields
from inl_jax.console import say
from inl_jax.model.platform.device import H100, made_for
from inl_jax.parallel.sharding import fit_to_mesh, make_mesh
from inl_jax.planning.memory import compiled_bytes, memory_needed
from inl_jax.planning.programs.xla import compile_abstractly, use_no_device
from inl_jax.terminal.command_line import Parser
from inl_jax.training.state import make_layout

_, *REMATS = get_args(field_types()["model.remat"])  # all but auto


def memory_estimate(parser: Parser, argv: Sequence[str]) -> Report:
    parser.add_argument("--sequences", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--remats", nargs="+", choices=REMATS, default=REMATS)
    use_no_device("cuda")
    config, flags = config_and_flags(parser, argv)
    rows = []
    for remat in flags.remats:
        for sequences in flags.sequences:
            # Two micro-batches at least: more of them need no more memory.
            batch = max(config.batch_size, 2 * sequences)
            fields = {"batch_size": batch, "accumulate_steps": batch // sequences}
            rows.append(row(with_fields(config, fields | {"model.remat": remat}), sequences))
    worst = max(rows, key=lambda row: abs(row["ratio"] - 1))
    notes = [f"{config.name}: estimated / compiled; the worst is {worst['ratio']:.3f}"]
    return Report({}, rows, notes)


def row(config: TrainConfig, sequences: int) -> dict:
    mesh = make_mesh(config.mesh, devices=jax.devices("cpu")[:1])
    config = fit_to_mesh(config, mesh)
    with made_for(H100):
        layout = make_layout(config, mesh)
        estimated = memory_needed(config, mesh, layout).device_bytes
    say(f"compiling {config.name}, {sequences} sequences, remat {config.model.remat}")
    program = compile_abstractly(config, mesh, layout, "cuda")
    compiled, _ = compiled_bytes(program.memory)
    return {
        "remat": config.model.remat,
        "sequences": sequences,
        "compiled_bytes": compiled,
        "estimated_bytes": estimated,
        "ratio": estimated / compiled,
    }


if __name__ == "__main__":
    main(memory_estimate)
