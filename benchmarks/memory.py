"""How much memory does the gradient of a block take?

python benchmarks/memory.py --config C [--section.field value ...] [--step] [--json]

Counts what the integrator's gradient keeps, and reads the temporary memory of a block's compiled
gradient; with --step also the memory of the whole compiled training step. Nothing is allocated.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from harness import (
    SEGMENT,
    Report,
    block_fn,
    check_iterations,
    config_and_flags,
    main,
    with_gradient,
)

from inl_jax.config import ModelConfig, TrainConfig
from inl_jax.console import say
from inl_jax.model.dynamics import Dynamics
from inl_jax.model.integrator import integrate
from inl_jax.model.language_model import abstract_params
from inl_jax.model.layers import compute_dtype
from inl_jax.parallel.sharding import on
from inl_jax.planning.preflight import make_plan
from inl_jax.terminal.command_line import Parser
from inl_jax.training.step import trace_step

SLICE = 2048  # positions in a chunk of the integrator if the config takes all at once


def memory(parser: Parser, argv: Sequence[str]) -> Report:
    parser.add_argument("--step", action="store_true", help="compile the whole training step too")
    config, flags = config_and_flags(parser, argv)
    c, S = config.model, config.data.seq_len
    check_iterations(c)
    segment = c.integrator_segment if c.integrator_segment > 1 else SEGMENT
    chunk = c.integrator_chunk or SLICE
    whole = dataclasses.replace(
        c,
        num_layers=1,
        attention_every=0,
        remat="none",
        integrator_segment=1,
        integrator_chunk=0,
    )
    segmented = dataclasses.replace(whole, integrator_segment=segment)
    sliced = dataclasses.replace(segmented, integrator_chunk=chunk)
    autodiff = dataclasses.replace(whole, integrator_gradient="autodiff")
    widths = {"": whole, "_segmented": segmented, "_autodiff": autodiff}
    temps = {"": sliced, "_segmented": segmented, "_whole": whole, "_autodiff": autodiff}
    record = {"segment": segment, "chunk": chunk}
    record |= {f"residual_widths{k}": residual_widths(v, S) for k, v in widths.items()}
    record |= {f"temp_bytes{k}": block_temp_bytes(v, S) for k, v in temps.items()}
    if flags.step:
        record |= step_memory(config)
    notes = [
        f"{config.name}: one {c.context} block without remat, D {c.d_model}, "
        f"C {c.controller_width}, T {c.num_iterations}, S {S}",
        "residual_widths: values kept for the gradient per token and iteration, in units of D",
        f"temp_bytes: of the block's compiled gradient, {compute_dtype(c)} products, in segments "
        f"of {segment} iterations and chunks of {chunk} positions (model.integrator_segment, "
        "integrator_chunk); whole: without both",
        f"autodiff takes {record['temp_bytes_autodiff'] / record['temp_bytes']:.2f} times the "
        "memory",
    ]
    return Report(record, [], notes)


def residual_widths(model: ModelConfig, seq_len: int) -> float:
    """Values that the integrator's gradient keeps, per token and iteration, in units of D.

    Counted in what `jax.vjp` hands to the backward pass, in float32. Values whose number does not
    grow with the tokens, such as parameters, cancel in the difference between two lengths.
    """
    blocks = abstract_params(model)["blocks"]
    params = {
        n: jax.ShapeDtypeStruct(p.shape[1:], "float32") for n, p in blocks["integrator"].items()
    }
    function = functools.partial(
        integrate,
        amplitude=model.excitation_amplitude,
        num_iterations=model.num_iterations,
        dynamics=Dynamics(model.dt, model.kappa, jnp.dtype("float32")),
        gradient=model.integrator_gradient,
        segment=model.integrator_segment,
    )

    def kept(length: int) -> int:
        x_BSD = jax.ShapeDtypeStruct((1, length, model.d_model), "float32")
        vjp = jax.eval_shape(lambda *arrays: jax.vjp(function, *arrays)[1], params, x_BSD, x_BSD)
        return sum(leaf.size for leaf in jax.tree.leaves(vjp))

    per_token = (kept(2 * seq_len) - kept(seq_len)) / seq_len
    return per_token / (model.num_iterations * model.d_model)


def block_temp_bytes(model: ModelConfig, seq_len: int) -> int:
    """Temporary memory of a block's gradient by its parameters and input, for one sequence."""
    blocks = abstract_params(model)["blocks"]
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype), blocks)
    x_BSD = jax.ShapeDtypeStruct((1, seq_len, model.d_model), compute_dtype(model))
    say(f"compiling a block, {model.integrator_gradient}, segment {model.integrator_segment}")
    compiled = jax.jit(with_gradient(block_fn(model))).lower(x_BSD, params, x_BSD).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def step_memory(config: TrainConfig) -> dict[str, Any]:
    """Memory and compile time of the whole training step."""
    config, mesh, layout = make_plan(config)
    say("compiling the training step")
    start = time.perf_counter()
    with on(mesh):
        traced = trace_step(config, mesh, layout)
        analysis = traced.lower().compile().memory_analysis()
    seconds = time.perf_counter() - start
    parts = ("argument", "temp", "alias", "output")
    found = {f"step_{part}_bytes": getattr(analysis, f"{part}_size_in_bytes") for part in parts}
    return found | {"step_compile_seconds": seconds}


if __name__ == "__main__":
    main(memory)
