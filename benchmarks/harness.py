"""What the benchmarks share: flags, measuring in turns, what is measured, and the report.

A benchmark answers one question in one file, by a function `(parser, argv) -> Report` that has the
file's name and that `main` runs.
"""

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from inl_jax.config import InputError, ModelConfig, TrainConfig
from inl_jax.limits import usable_cpus
from inl_jax.model.integrator import Integrator
from inl_jax.model.language_model import Block
from inl_jax.model.layers import compute_dtype
from inl_jax.model.mixers.span import TokenSpan
from inl_jax.planning.programs.xla import apply_flags
from inl_jax.terminal.command_line import (
    Parser,
    exit_on_input_error,
    from_command_line,
    lines_on_stderr,
)

PAUSE = 0.3  # seconds between two measurements, so that idle threads stop spinning
MATMUL = (512, 2048, 8192)  # rows, inner, columns of the product that gives the machine's rate
SEGMENT = 7  # iterations in a segment if the config has no segments


class Report(NamedTuple):
    """What a benchmark found."""

    record: dict[str, Any]  # single numbers, for --json
    rows: list[dict[str, Any]]  # the table; if empty, the single numbers are the table
    notes: list[str]  # lines below the table


def main(benchmark: Callable[..., Report], argv: Sequence[str] | None = None) -> None:
    """Runs a benchmark as the command `python benchmarks/NAME.py [flags] [--json]`.

    Prints a table, or one JSON object with --json; all other lines go to stderr.

    Args:
      benchmark: its name is NAME, and the docstring of its file is the text of --help.
      argv: the command line; the process's own by default.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser(benchmark.__name__, sys.modules[benchmark.__module__].__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    with exit_on_input_error(), lines_on_stderr():
        report = benchmark(parser, argv)
    head = {"command": shlex.join(["python", parser.prog, *argv]), "machine": machine()}
    if "--json" in argv:
        print(json.dumps(head | report.record | ({"rows": report.rows} if report.rows else {})))
        return
    listed = [{"what": name, "value": shown(name, x)} for name, x in report.record.items()]
    print(*head.values(), "", table(report.rows or listed), *report.notes, sep="\n")


# --- flags


def make_parser(name: str, doc: str) -> Parser:
    """A parser for `python benchmarks/NAME.py`; --help comes with the config or in `flags_only`."""
    parser = Parser(name, doc, add_help=False)
    parser.prog = f"benchmarks/{name}.py"
    return parser


def number(parser: argparse.ArgumentParser, name: str, default: int, text: str) -> None:
    """Adds a flag that takes an integer."""
    parser.add_argument(name, type=int, default=default, help=f"{text}; {default} by default")


def flags_only(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """The flags of a benchmark that takes no config."""
    parser.add_argument("-h", "--help", action="help", help="show this")
    return check_positive(parser.parse_flags(argv))


def config_and_flags(parser: Parser, argv: Sequence[str]) -> tuple[TrainConfig, argparse.Namespace]:
    """The config with its overrides, after its XLA flags are applied, and the benchmark's flags."""
    config, flags = from_command_line(parser, argv)
    apply_flags(config.xla_flags)
    return config, check_positive(flags)


def check_positive(flags: argparse.Namespace) -> argparse.Namespace:
    """Raises `InputError` if an integer among the flags is not positive."""
    for name, value in vars(flags).items():
        for one in value if isinstance(value, list) else [value]:
            if type(one) is int and one < 1:
                raise InputError(f"--{name} {one}: must be positive")
    return flags


def check_iterations(model: ModelConfig) -> None:
    """Raises `InputError` if the model has no integrator."""
    if model.num_iterations == 0:
        raise InputError("model.num_iterations=0: there is no integrator to measure; set 1 or more")


# --- measuring


def interleaved(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round; in a round all take their turn, A B C, A B C.

    Each is called once before, which does not count.

    Args:
      contenders: functions that return when their work is done.
      rounds: measurements of each.
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
    """A call of a program that waits for its results."""
    return lambda: jax.block_until_ready(program(*arrays))


def ratios(seconds: list[float], base: list[float]) -> tuple[float, float, float]:
    """Median, smallest and largest of `seconds / base`, round by round."""
    each = [a / b for a, b in zip(seconds, base, strict=True)]
    return statistics.median(each), min(each), max(each)


def matmul_operands(dtype) -> tuple[jax.Array, jax.Array]:
    """Random factors of the product `MATMUL`."""
    rows, inner, columns = MATMUL
    a, b = jax.random.split(jax.random.key(2))
    return jax.random.normal(a, (rows, inner), dtype), jax.random.normal(b, (inner, columns), dtype)


def matmul_gflops(seconds: list[float]) -> float:
    """GFLOP/s of the product `MATMUL`, by the median of its times."""
    rows, inner, columns = MATMUL
    return 2e-9 * rows * inner * columns / statistics.median(seconds)


def matmul_shape() -> str:
    """`MATMUL` for people."""
    return "x".join(map(str, MATMUL))


# --- what is measured


def integrator_fn(config: ModelConfig) -> Callable:
    """The integrator as a function of its parameters, the context and the initial state."""

    def layer(params, h_BSD, x_BSD):
        settings = {"amplitude": config.excitation_amplitude, "dtype": compute_dtype(config)}
        return Integrator(config).apply({"params": params}, h_BSD, x_BSD, **settings)

    return layer


def block_fn(config: ModelConfig) -> Callable:
    """The block with the mixer `config.context`, as a function of its parameters and the stream."""

    def block(params, x_BSD):
        tokens = TokenSpan(jnp.broadcast_to(jnp.arange(x_BSD.shape[1]), x_BSD.shape[:2]), None)
        amplitude = config.excitation_amplitude
        return Block(config, config.context).apply(
            {"params": params}, x_BSD, None, tokens, amplitude
        )[0]

    return block


def with_gradient(function: Callable) -> Callable:
    """`(dy, *arrays) -> y, gradients`, the gradients by all arrays.

    It returns y because XLA would otherwise leave out the product that only y needs.
    """

    def both(dy, *arrays):
        y, vjp = jax.vjp(function, *arrays)
        return y, vjp(dy.astype(y.dtype))

    return both


# --- printing


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as aligned columns below the names of their fields."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([shown(name, row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in cells]
    return "\n".join(line.rstrip() for line in lines)


def markdown(rows: list[dict[str, str]]) -> str:
    """Rows of the same fields as a Markdown table below the names of these fields."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(name: str, value: Any) -> str:
    """A number for people: MiB if `bytes` is in its name, four digits, or whole with commas."""
    if "bytes" in name and value != "":
        return f"{value / 2**20:,.1f} MiB"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def machine() -> str:
    """The device, and the versions of JAX and Python, in one line."""
    device = jax.devices()[0]
    name = device.device_kind
    if device.platform == "cpu":
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name = f"{models[0] if models else platform.machine()}, {usable_cpus()} CPUs"
    return f"{name}, jax {jax.__version__}, Python {platform.python_version()}"
