"""How fast is training, and what does the integrator cost of it?

python benchmarks/train.py --config C [--section.field value ...] [--tax] [--json]

Runs training steps on random tokens with the state donated, and waits for the device only at the
end.
"""

import argparse
import functools
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import (
    Report,
    config_and_flags,
    interleaved,
    jax_contender,
    main,
    matmul_gflops,
    matmul_operands,
    matmul_shape,
    number,
)

from inl_jax.config import TrainConfig, with_fields
from inl_jax.parallel.sharding import make_mesh, on, place, shardings_of
from inl_jax.planning.cost import flops_per_token, utilization
from inl_jax.planning.memory import compiled_bytes, memory_needed
from inl_jax.planning.preflight import make_plan
from inl_jax.terminal.command_line import Parser
from inl_jax.training.state import init_state, make_layout
from inl_jax.training.step import compile_step


def train(parser: Parser, argv: Sequence[str]) -> Report:
    number(parser, "--updates", 10, "updates that count")
    number(parser, "--warmup", 2, "updates before them")
    parser.add_argument("--tax", action="store_true", help="measure num_iterations 0 as well")
    config, flags = config_and_flags(parser, argv)
    config = make_plan(config).config
    record = training(config, flags)
    rows = [record]
    if flags.tax and config.model.num_iterations > 0:
        rows.append(training(with_fields(config, {"model.num_iterations": 0}), flags))
        tax = record["seconds_per_update"] / rows[1]["seconds_per_update"]
        record = record | {"integrator_tax": tax}
    notes = [
        f"{config.name}: {config.batch_size} sequences of {config.data.seq_len} in "
        f"{config.accumulate_steps} micro-batches, {flags.updates} updates",
        f"peak_bytes: {peak_memory()[1]}; the second row's includes the first's",
    ]
    if "mfu" not in record:
        notes.append(
            "this device's peak is not known: share_of_matmul is the share of the measured rate of "
            f"the float32 product {matmul_shape()}"
        )
    if "integrator_tax" in record:
        notes.append(f"integrator tax: {record['integrator_tax']:.2f} times the time without it")
    return Report(record, rows, notes)


def training(config: TrainConfig, flags: argparse.Namespace) -> dict[str, Any]:
    """Speed and memory of training steps of one config, which is fitted to the mesh."""
    mesh = make_mesh(config.mesh)
    shape = (config.batch_size, config.data.seq_len + 1)
    tokens = np.random.default_rng(0).integers(config.model.vocab_size, size=shape, dtype=np.int32)
    layout = make_layout(config, mesh)
    with on(mesh):
        start = time.perf_counter()
        step = compile_step(config, mesh, layout)
        compile_seconds = time.perf_counter() - start
        fresh = functools.partial(init_state, config=config)
        state = jax.jit(fresh, out_shardings=shardings_of(layout.state))(
            jax.random.key(config.seed)
        )
        batch, learning_rate = place(mesh, tokens), np.float32(config.optim.learning_rate)
        for _ in range(flags.warmup):
            state, _ = step(state, batch, learning_rate)
        jax.block_until_ready(state)
        start = time.perf_counter()
        for _ in range(flags.updates):
            state, _ = step(state, batch, learning_rate)
        jax.block_until_ready(state)
        seconds = (time.perf_counter() - start) / flags.updates
    rate = config.batch_size * config.data.seq_len / seconds
    flops = 3 * flops_per_token(config.model, config.data.seq_len)
    share = utilization(config, mesh, rate)
    if not share:
        product = jax_contender(jax.jit(jnp.matmul), *matmul_operands(jnp.float32))
        gflops = matmul_gflops(interleaved({"matmul": product}, 5)["matmul"])
        share = {"share_of_matmul": 1e-9 * rate * flops / gflops, "matmul_gflops": gflops}
    return {
        "num_iterations": config.model.num_iterations,
        "tokens_per_second": rate,
        "seconds_per_update": seconds,
        "flops_per_token": flops,
        **share,
        "peak_bytes": peak_memory()[0],
        "compiled_bytes": compiled_bytes(step.memory_analysis())[0],
        "estimated_bytes": memory_needed(config, mesh, layout).device_bytes,
        "compile_seconds": compile_seconds,
    }


def peak_memory() -> tuple[int, str]:
    """The most bytes that this process has held, and what was counted."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"], "device memory, peak_bytes_in_use"
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return peak, "memory of the whole process including its compiler, ru_maxrss"


if __name__ == "__main__":
    main(train)
