"""Times and memory of this project's parts: python scripts/benchmark.py VERB [flags] [--json].

integrator   one integrator and one published block, beside plain JAX and PyTorch
train        training steps of a config                --config C [overrides] [--tax]
generate     prefill and decoding                      --config C [--checkpoint RUN]
memory       what training keeps, allocating nothing   --config C [--step]
remat        what is recomputed: memory against time   --config C [--layers 2] [--tokens 512]
loss         the loss in token chunks, beside all logits at once

A table is printed, with --json one JSON object; everything else goes to stderr. What is compared
runs in turns in one process: A B C, A B C, ...
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import platform
import re
import resource
import shlex
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from inl_jax.cli.command_line import exit_on_input_error, from_command_line
from inl_jax.config import InputError, ModelConfig, TrainConfig
from inl_jax.console import speak_to
from inl_jax.model.dynamics import Dynamics
from inl_jax.model.integrator import Integrator, integrate
from inl_jax.model.language_model import (
    Block,
    abstract_params,
    hidden_states,
    init_params,
    logits,
)
from inl_jax.model.layers import compute_dtype
from inl_jax.model.losses import CHUNK, mean_loss
from inl_jax.model.mixers import TokenSpan
from inl_jax.parallel.sharding import RULES, fit_to_mesh, make_mesh, place
from inl_jax.planning.cost import flops_per_token, utilization
from inl_jax.planning.xla import apply_flags
from inl_jax.sampling import decode_loop, prefill
from inl_jax.training.checkpoint import read_params
from inl_jax.training.optim import any_length_optimizer
from inl_jax.training.state import init_state, make_layout
from inl_jax.training.step import compile_step, trace_step

PAUSE = 0.3  # seconds between measurements, in which idle threads stop spinning
MATMUL = (512, 2048, 8192)  # the product by which the machine's rate is measured
SEGMENT = 7  # iterations in a segment, where the config has no segments
SLICE = 2048  # positions that go through the integrator together, where the config takes all
REMATS = (  # model.remat, .integrator_gradient and .integrator_segment; the first is the base
    ("none", "lean", 1),
    ("none", "lean", SEGMENT),
    ("integrator", "lean", 1),
    ("all_but_integrator", "lean", 1),
    ("all_but_integrator", "lean", SEGMENT),
    ("block", "lean", 1),
    ("none", "autodiff", 1),
)


class Report(NamedTuple):
    """What a verb found."""

    record: dict[str, Any]  # single numbers, for --json
    rows: list[dict[str, Any]]  # the table; without rows, the single numbers
    notes: list[str]  # lines under the table


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__.strip())
        return
    with exit_on_input_error():
        if argv[0] not in VERBS:
            raise InputError(f"{argv[0]}: choose one of {', '.join(VERBS)}")
        verb = VERBS[argv[0]]
        parser = argparse.ArgumentParser(
            prog=f"benchmark.py {argv[0]}",
            description=verb.__doc__,
            add_help=False,
            allow_abbrev=False,  # --batch_size is a field of the config, --batch_sizes a flag
        )
        parser.add_argument("--json", action="store_true", help="print one JSON object instead")
        report = verb(parser, argv[1:])
    where = {"command": shlex.join(["python", "scripts/benchmark.py", *argv]), "machine": machine()}
    if "--json" in argv:
        print(json.dumps(where | report.record | ({"rows": report.rows} if report.rows else {})))
        return
    listed = [{"what": name, "value": shown(name, x)} for name, x in report.record.items()]
    print(*where.values(), "", table(report.rows or listed), *report.notes, sep="\n")


# --- what the verbs share


def say(line: str) -> None:
    """A line for stderr."""
    print(line, file=sys.stderr, flush=True)


def number(parser: argparse.ArgumentParser, name: str, default: int, text: str) -> None:
    """Adds a flag that takes an integer."""
    parser.add_argument(name, type=int, default=default, help=f"{text}; {default} by default")


def check_positive(flags: argparse.Namespace) -> argparse.Namespace:
    """Raises `InputError` where a number among the flags is not positive."""
    for name, value in vars(flags).items():
        for one in value if isinstance(value, list) else [value]:
            if type(one) is int and one < 1:
                raise InputError(f"--{name} {one}: must be positive")
    return flags


def config_and_flags(parser, argv) -> tuple[TrainConfig, argparse.Namespace]:
    """The config with its overrides and XLA flags applied, and the verb's own flags."""
    with exit_on_input_error():
        config, flags = from_command_line(parser, argv)
    speak_to(sys.stderr)  # stdout is for the record
    apply_flags(config.xla_flags)
    speak_to(None)
    return config, check_positive(flags)


def interleaved(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round, after one call of each that does not count.

    Args:
      contenders: functions that return when their work is done.
      rounds: how often each is measured, in turns.
    """
    for run in contenders.values():
        run()
    seconds = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def jax_contender(program: Callable, *arrays) -> Callable[[], Any]:
    """A call of a compiled program that waits for its results."""
    return lambda: jax.block_until_ready(program(*arrays))


def ratios(seconds: list[float], base: list[float]) -> tuple[float, float, float]:
    """Median, smallest and largest of `seconds / base`, round by round."""
    each = [a / b for a, b in zip(seconds, base, strict=True)]
    return statistics.median(each), min(each), max(each)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as aligned columns, under the names of their fields."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([shown(name, row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in cells]
    return "\n".join(line.rstrip() for line in lines)


def shown(name: str, value: Any) -> str:
    """A number for people."""
    if "bytes" in name and value != "":
        return f"{value / 2**20:,.1f} MiB"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def machine() -> str:
    """What this runs on, in one line."""
    device = jax.devices()[0]
    name = device.device_kind
    if device.platform == "cpu":
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name = f"{models[0] if models else platform.machine()}, {usable_cpus()} CPUs"
    return f"{name}, jax {jax.__version__}, Python {platform.python_version()}"


def usable_cpus() -> int:
    """The number of CPUs that this process may use."""
    known = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1


def integrator_fn(config: ModelConfig) -> Callable:
    """The integrator as a function of (its parameters, context, initial state)."""

    def layer(params, h_BSD, x_BSD):
        settings = {"amplitude": config.excitation_amplitude, "dtype": compute_dtype(config)}
        return Integrator(config).apply({"params": params}, h_BSD, x_BSD, **settings)

    return layer


def block_fn(config: ModelConfig) -> Callable:
    """The block as a function of (its parameters, the stream)."""

    def block(params, x_BSD):
        tokens = TokenSpan(jnp.broadcast_to(jnp.arange(x_BSD.shape[1]), x_BSD.shape[:2]), None)
        amplitude = config.excitation_amplitude
        return Block(config).apply({"params": params}, x_BSD, None, tokens, amplitude)[0]

    return block


def with_gradient(function: Callable) -> Callable:
    """(dy, *arrays) -> y and the gradient by all arrays. Without y a product would be left out."""

    def both(dy, *arrays):
        y, vjp = jax.vjp(function, *arrays)
        return y, vjp(dy.astype(y.dtype))

    return both


def matmul_operands(dtype) -> tuple[jax.Array, jax.Array]:
    """Random factors of the product `MATMUL`."""
    rows, inner, columns = MATMUL
    a, b = jax.random.split(jax.random.key(2))
    return jax.random.normal(a, (rows, inner), dtype), jax.random.normal(b, (inner, columns), dtype)


def matmul_gflops(seconds: list[float]) -> float:
    """The rate at which the product `MATMUL` was done."""
    rows, inner, columns = MATMUL
    return 2e-9 * rows * inner * columns / statistics.median(seconds)


# --- integrator


def integrator(parser, argv) -> Report:
    """One integrator and one published block (mean context): ours, the plain scan, PyTorch."""
    number(parser, "--d_model", 2048, "width")
    number(parser, "--num_iterations", 15, "iterations")
    number(parser, "--d_ff", 8192, "feed-forward width")
    number(parser, "--tokens", 512, "tokens, in one sequence")
    number(parser, "--rounds", 7, "measurements of each")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--skip_compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("-h", "--help", action="help", help="show this")
    flags = check_positive(parser.parse_args(argv))
    # PyTorch needs some of the GPU's memory too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    config = ModelConfig(
        vocab_size=1,
        d_model=flags.d_model,
        num_layers=1,
        num_iterations=flags.num_iterations,
        d_ff=flags.d_ff,
        max_seq_len=flags.tokens,
        context="mean",
        remat="none",
        compute_dtype=flags.dtype,
    )
    params = init_params(config, jax.random.key(0))
    block = jax.tree.map(lambda p: p[0], params["blocks"])
    h, x, dy = jax.random.normal(jax.random.key(1), (3, 1, flags.tokens, flags.d_model))
    torch_side = start_torch(params, config, skip_compile=flags.skip_compile)
    pieces = {
        "integrator": (integrator_fn, (block["integrator"], h, x)),
        "block": (block_fn, (block, x)),
    }
    record, rows = {"torch": torch_side.version if torch_side else "not installed"}, []
    for (piece, (function, arrays)), backward in itertools.product(pieces.items(), (False, True)):
        row = {"piece": piece, "what": "forward+backward" if backward else "forward"}
        contenders, failed = {}, {"torch eager": "torch not installed"}
        for name, gradient in {"ours": "lean", "plain scan": "autodiff"}.items():
            f = function(dataclasses.replace(config, integrator_gradient=gradient))
            program, inputs = (with_gradient(f), (dy, *arrays)) if backward else (f, arrays)
            contenders[name] = jax_contender(jax.jit(program), *inputs)
        if torch_side:
            inputs = [np.array(a) for a in (*arrays[1:], dy)]
            found, failed = torch_side.contenders(piece, inputs, backward=backward)
            contenders |= found
        if piece == "block" and backward:
            ab = matmul_operands(jnp.dtype(flags.dtype))
            contenders["matmul"] = jax_contender(jax.jit(jnp.matmul), *ab)
            if torch_side:
                wide = [np.array(a.astype(jnp.float32)) for a in ab]
                contenders["matmul torch"] = torch_side.matmul(*wide)
        say(f"measuring {row['piece']}, {row['what']}: {', '.join(contenders)}")
        seconds = interleaved(contenders, flags.rounds)
        for name, each in seconds.items():
            slug = re.sub(r"\W", "_", name)
            median, ratio = statistics.median(each), ratios(each, seconds["ours"])
            found = {"contender": name, "median_ms": 1000 * median, "min_ms": 1000 * min(each)}
            if name.startswith("matmul"):
                found |= {"piece": "x".join(map(str, MATMUL)), "what": "product"}
                record[f"{slug}_gflops"] = matmul_gflops(each)
            elif name != "ours":
                found |= zip(("over_ours", "from", "to"), ratio, strict=True)
                if backward:
                    key = f"{piece}_speedup_vs_{slug}"
                    record |= zip((key, f"{key}_min", f"{key}_max"), ratio, strict=True)
            rows.append(row | found)
        rows += [row | {"contender": name, "note": why} for name, why in failed.items()]
    # `seconds` are now those of the block, forward and backward.
    vocabulary = 2 * config.d_model * config.vocab_size
    flops = 3 * flags.tokens * (flops_per_token(config, flags.tokens) - vocabulary)
    bound = flops / (1e9 * record["matmul_gflops"])
    times = statistics.median(seconds["ours"]) / bound
    record |= {"block_arithmetic_seconds": bound, "block_times_arithmetic_bound": times}
    notes = [
        f"{flags.tokens} tokens, {flags.dtype}; over_ours: median of the rounds' ratios, from..to",
        f"at {record['matmul_gflops']:.0f} GFLOP/s, the rate of jax's product here, the arithmetic "
        f"of the block's forward+backward takes {1000 * bound:.0f} ms; ours takes {times:.2f} "
        "times that",
        f"torch {record['torch']}",
    ]
    return Report(record, rows, notes)


def start_torch(params, config: ModelConfig, *, skip_compile: bool):
    """PyTorch's side of the comparison; None, said loudly, where it is not installed."""
    try:
        import torch_reference
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        say("WARNING: torch is not installed, so PyTorch is not measured: pip install torch")
        return None
    return torch_reference.TorchSide(
        params,
        config,
        skip_compile=skip_compile,
        num_threads=usable_cpus(),
        want_gpu=jax.default_backend() == "gpu",
        report=say,
    )


# --- train


def train(parser, argv) -> Report:
    """Training steps of a config on random tokens, the state donated, blocking only at the end."""
    number(parser, "--updates", 10, "updates that count")
    number(parser, "--warmup", 2, "updates before them")
    parser.add_argument("--tax", action="store_true", help="measure num_iterations 0 as well")
    config, flags = config_and_flags(parser, argv)
    config = fit_to_mesh(config, make_mesh(config.mesh))
    record = training(config, flags)
    rows = [record]
    if flags.tax and config.model.num_iterations > 0:
        without = dataclasses.replace(config.model, num_iterations=0)
        rows.append(training(dataclasses.replace(config, model=without), flags))
        tax = record["seconds_per_update"] / rows[1]["seconds_per_update"]
        record = record | {"integrator_tax": tax}
    notes = [
        f"{config.name}: {config.batch_size} sequences of {config.data.seq_len} in "
        f"{config.accumulate_steps} micro-batches, {flags.updates} updates",
        f"peak_bytes: {peak_memory()[1]}; a second row's holds the first's",
    ]
    if "mfu" not in record:
        notes.append(
            "no peak is known for this device: share_of_matmul is of the float32 product "
            f"{'x'.join(map(str, MATMUL))}, measured"
        )
    if "integrator_tax" in record:
        notes.append(f"integrator tax: {record['integrator_tax']:.2f} times the time without it")
    return Report(record, rows, notes)


def training(config: TrainConfig, flags) -> dict[str, Any]:
    """What training steps of one config take."""
    mesh = make_mesh(config.mesh)
    shape = (config.batch_size, config.data.seq_len + 1)
    tokens = np.random.default_rng(0).integers(config.model.vocab_size, size=shape, dtype=np.int32)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        abstract = make_layout(config, mesh)
        start = time.perf_counter()
        log = types.SimpleNamespace(say=say)
        step = compile_step(config, run_length(config), mesh, abstract, log)
        compile_seconds = time.perf_counter() - start
        fresh = functools.partial(init_state, config=config, optimizer=any_length_optimizer(config))
        shardings = jax.tree.map(lambda a: a.sharding, abstract)
        state = jax.jit(fresh, out_shardings=shardings)(jax.random.key(config.seed))
        batch = place(mesh, tokens)
        for _ in range(flags.warmup):
            state, _ = step(state, batch)
        jax.block_until_ready(state)
        start = time.perf_counter()
        for _ in range(flags.updates):
            state, _ = step(state, batch)
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
        "compile_seconds": compile_seconds,
    }


def run_length(config: TrainConfig) -> int:
    """Updates in the run; enough for the warmup where epochs decide."""
    return config.num_steps or config.optim.warmup_steps + 1


def peak_memory() -> tuple[int, str]:
    """The most bytes this process has held, and where."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"], "device memory, peak_bytes_in_use"
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return peak, "memory of the whole process with its compiler, ru_maxrss"


# --- generate


def generate(parser, argv) -> Report:
    """Prefill and decoding of a config, with random weights or those of a run."""
    parser.add_argument("--checkpoint", help="run directory; random weights without it")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--positions", type=int, nargs="+", default=[100, 4000])
    number(parser, "--new_tokens", 64, "tokens decoded from each position on")
    number(parser, "--rounds", 3, "measurements of each")
    config, flags = config_and_flags(parser, argv)
    c, new = config.model, flags.new_tokens
    last = c.max_seq_len - new
    if last < 1:
        raise InputError(f"--new_tokens {new}: must be below model.max_seq_len={c.max_seq_len}")
    if max(flags.positions) > last:
        say(f"positions are clipped to {last}: model.max_seq_len is {c.max_seq_len}")
    if flags.checkpoint:
        params = read_params(flags.checkpoint, c)[1]
    else:
        params = init_params(c, jax.random.key(config.seed))
    rows = []
    for batch_size in flags.batch_sizes:
        for position in dict.fromkeys(min(p, last) for p in flags.positions):
            seconds = generating(c, params, batch_size, position, new, flags.rounds)
            row = {"batch_size": batch_size, "position": position}
            for what, tokens in {"prefill": position, "decode": new}.items():
                rate = batch_size * tokens / statistics.median(seconds[what])
                row[f"{what}_tokens_per_second"] = rate
            rows.append(row)
    weights = flags.checkpoint or "random weights"
    note = f"{config.name}, {weights}, {new} new tokens, the likeliest each time"
    return Report({}, rows, [note])


def generating(config, params, batch_size, position, new_tokens, rounds) -> dict[str, list[float]]:
    """Seconds of prefill up to a position and of decoding from there on."""
    shape = (batch_size, position)
    ids = np.random.default_rng(0).integers(config.vocab_size, size=shape, dtype=np.int32)
    lengths = np.full(batch_size, position)
    keys = jax.random.split(jax.random.key(0), batch_size)
    ready = []

    def read():
        found = prefill(config, params, ids, lengths, max_len=position + new_tokens)
        ready[:] = jax.block_until_ready(found)

    def decode():  # consumes the state, so there is one prefill before each
        found = decode_loop(
            config,
            params,
            *ready,
            keys,
            np.int32(-1),
            np.float32(0),
            None,
            max_new_tokens=new_tokens,
            greedy=True,
            top_k=0,
            num_ids=config.vocab_size,
        )
        jax.block_until_ready(found)

    return interleaved({"prefill": read, "decode": decode}, rounds)


# --- memory


def memory(parser, argv) -> Report:
    """What the gradient keeps, and the temporary memory of one block; nothing is allocated."""
    parser.add_argument("--step", action="store_true", help="compile the whole training step too")
    config, flags = config_and_flags(parser, argv)
    c, S = config.model, config.data.seq_len
    check_iterations(c)
    segment = c.integrator_segment if c.integrator_segment > 1 else SEGMENT
    chunk = c.integrator_chunk or SLICE
    whole = dataclasses.replace(
        c, num_layers=1, remat="none", integrator_segment=1, integrator_chunk=0
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
        f"temp_bytes: of the block's compiled gradient, {compute_dtype(c)} products, with segments "
        f"of {segment} iterations in chunks of {chunk} positions (model.integrator_segment, "
        "integrator_chunk); whole: without these",
        f"autodiff takes {record['temp_bytes_autodiff'] / record['temp_bytes']:.2f} times the "
        "memory",
    ]
    return Report(record, [], notes)


def check_iterations(model: ModelConfig) -> None:
    """Raises `InputError` where there is no integrator."""
    if model.num_iterations == 0:
        raise InputError("model.num_iterations=0: there is no integrator to measure")


def residual_widths(model: ModelConfig, seq_len: int) -> float:
    """Values the integrator's gradient keeps, per token and iteration, in units of D.

    Counted from what `jax.vjp` hands on, in float32. What does not grow with the tokens, such as
    parameters, drops out of the difference between two lengths.
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
        x = jax.ShapeDtypeStruct((1, length, model.d_model), "float32")
        vjp = jax.eval_shape(lambda *arrays: jax.vjp(function, *arrays)[1], params, x, x)
        return sum(leaf.size for leaf in jax.tree.leaves(vjp))

    per_token = (kept(2 * seq_len) - kept(seq_len)) / seq_len
    return per_token / (model.num_iterations * model.d_model)


def block_temp_bytes(model: ModelConfig, seq_len: int) -> int:
    """Temporary memory of a block's gradient by its parameters and input, for one sequence."""
    blocks = abstract_params(model)["blocks"]
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype), blocks)
    x = jax.ShapeDtypeStruct((1, seq_len, model.d_model), compute_dtype(model))
    say(f"compiling a block, {model.integrator_gradient}, segment {model.integrator_segment}")
    compiled = jax.jit(with_gradient(block_fn(model))).lower(x, params, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def step_memory(config: TrainConfig) -> dict[str, Any]:
    """Memory and compile time of the whole training step."""
    mesh = make_mesh(config.mesh)
    say("compiling the training step")
    start = time.perf_counter()
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        traced = trace_step(config, run_length(config), mesh, make_layout(config, mesh))
        analysis = traced.lower().compile().memory_analysis()
    seconds = time.perf_counter() - start
    parts = ("argument", "temp", "alias", "output")
    found = {f"step_{part}_bytes": getattr(analysis, f"{part}_size_in_bytes") for part in parts}
    return found | {"step_compile_seconds": seconds}


# --- remat


def remat(parser, argv) -> Report:
    """A stack of blocks under each setting of model.remat: temporary memory and time."""
    number(parser, "--layers", 2, "blocks")
    number(parser, "--tokens", 512, "tokens, in one sequence")
    number(parser, "--rounds", 5, "measurements of each")
    config, flags = config_and_flags(parser, argv)
    check_iterations(config.model)
    base = dataclasses.replace(
        config.model,
        num_layers=flags.layers,
        vocab_size=1,
        dropout=0.0,
        integrator_segment=1,
        max_seq_len=max(flags.tokens, config.model.max_seq_len),
    )
    params = init_params(base, jax.random.key(config.seed))
    ids = jnp.zeros((1, flags.tokens), jnp.int32)
    dy = jax.random.normal(jax.random.key(1), (1, flags.tokens, base.d_model))
    rows, contenders = [], {}
    for kind, gradient, segment in REMATS:
        say(f"compiling {kind}, {gradient}, segment {segment}")
        model = dataclasses.replace(
            base, remat=kind, integrator_gradient=gradient, integrator_segment=segment
        )
        function = functools.partial(hidden_states, model, input_ids=ids)
        compiled = jax.jit(with_gradient(function)).lower(dy, params).compile()
        contenders[len(rows)] = jax_contender(compiled, dy, params)
        temp = compiled.memory_analysis().temp_size_in_bytes
        rows.append({"remat": kind, "gradient": gradient, "segment": segment, "temp_bytes": temp})
    seconds = interleaved(contenders, flags.rounds)
    for i, row in enumerate(rows):
        row["memory_over_none"] = row["temp_bytes"] / rows[0]["temp_bytes"]
        row["median_ms"] = 1000 * statistics.median(seconds[i])
        ratio = ratios(seconds[i], seconds[0])
        row |= zip(("time_over_none", "from", "to"), ratio, strict=True)
    note = (
        f"{config.name}: {flags.layers} {base.context} blocks, D {base.d_model}, "
        f"T {base.num_iterations}, {flags.tokens} tokens; temp_bytes and time of the gradient"
    )
    return Report({}, rows, [note])


# --- loss


def loss(parser, argv) -> Report:
    """The training loss and its gradient: in token chunks, and with the logits of all tokens."""
    number(parser, "--d_model", 2048, "width")
    number(parser, "--vocab_size", 50257, "vocabulary")
    number(parser, "--tokens", 4096, "tokens, in one sequence")
    number(parser, "--chunk", CHUNK, "tokens whose logits exist at once")
    number(parser, "--rounds", 3, "measurements of each")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("-h", "--help", action="help", help="show this")
    flags = check_positive(parser.parse_args(argv))
    keys = jax.random.split(jax.random.key(0), 3)
    embedding = 0.02 * jax.random.normal(keys[0], (flags.vocab_size, flags.d_model), flags.dtype)
    hidden = jax.random.normal(keys[1], (1, flags.tokens, flags.d_model), flags.dtype)
    targets = jax.random.randint(keys[2], (1, flags.tokens), 0, flags.vocab_size)

    def at_once(embedding_VD, hidden_BSD):
        all_logits = logits({"embedding": embedding_VD}, hidden_BSD)
        return optax.softmax_cross_entropy_with_integer_labels(all_logits, targets).mean()

    def in_chunks(embedding_VD, hidden_BSD):
        return mean_loss({"embedding": embedding_VD}, hidden_BSD, targets, chunk=flags.chunk)

    rows, contenders = {}, {}
    for name, function in {"at once": at_once, "in chunks": in_chunks}.items():
        program = jax.jit(jax.value_and_grad(function, (0, 1)))
        compiled = program.lower(embedding, hidden).compile()
        temp = compiled.memory_analysis().temp_size_in_bytes
        rows[name] = {"loss": name, "temp_bytes": temp}
        contenders[name] = jax_contender(compiled, embedding, hidden)
    seconds = interleaved(contenders, flags.rounds)
    for name, row in rows.items():
        row["median_ms"] = 1000 * statistics.median(seconds[name])
        ratio = ratios(seconds[name], seconds["at once"])
        row |= zip(("time_over_at_once", "from", "to"), ratio, strict=True)
    whole, chunked = rows.values()
    record = {
        "loss_memory_ratio": whole["temp_bytes"] / chunked["temp_bytes"],
        "loss_time_ratio": chunked["time_over_at_once"],
    }
    note = (
        f"{flags.tokens} tokens, vocabulary {flags.vocab_size}, D {flags.d_model}, {flags.dtype}, "
        f"chunks of {flags.chunk}; at once takes {record['loss_memory_ratio']:.1f} times the memory"
    )
    return Report(record, list(rows.values()), [note])


VERBS = {
    "integrator": integrator,
    "train": train,
    "generate": generate,
    "memory": memory,
    "remat": remat,
    "loss": loss,
}


if __name__ == "__main__":
    main()
