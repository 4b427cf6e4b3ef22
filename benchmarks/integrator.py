"""How fast are one integrator and one published block, beside plain JAX and PyTorch?

python benchmarks/integrator.py [--tokens 512] [--dtype bfloat16] [--skip_compile] [--json]

The block has the mean context. "Ours" is the library; "plain scan" is the same loop under automatic
differentiation; torch_reference.py is the PyTorch model.
"""

import dataclasses
import itertools
import os
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import (
    Report,
    block_fn,
    flags_only,
    integrator_fn,
    interleaved,
    jax_contender,
    main,
    matmul_gflops,
    matmul_operands,
    matmul_shape,
    number,
    ratios,
    with_gradient,
)

from inl_jax.config import ModelConfig
from inl_jax.console import say
from inl_jax.limits import usable_cpus
from inl_jax.model.language_model import init_params
from inl_jax.planning.cost import flops_per_token
from inl_jax.terminal.command_line import Parser


def integrator(parser: Parser, argv: Sequence[str]) -> Report:
    number(parser, "--d_model", 2048, "width")
    number(parser, "--num_iterations", 15, "iterations")
    number(parser, "--d_ff", 8192, "feed-forward width")
    number(parser, "--tokens", 512, "tokens, in one sequence")
    number(parser, "--rounds", 7, "measurements of each")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--skip_compile", action="store_true", help="leave out torch.compile")
    flags = flags_only(parser, argv)
    # JAX must leave some of the GPU's memory to PyTorch.
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
    h_BSD, x_BSD, dy_BSD = jax.random.normal(jax.random.key(1), (3, 1, flags.tokens, flags.d_model))
    torch_side = start_torch(params, config, skip_compile=flags.skip_compile)
    pieces = {
        "integrator": (integrator_fn, (block["integrator"], h_BSD, x_BSD)),
        "block": (block_fn, (block, x_BSD)),
    }
    record, rows = {"torch": torch_side.version if torch_side else "not installed"}, []
    for (piece, (function, arrays)), backward in itertools.product(pieces.items(), (False, True)):
        what = "forward+backward" if backward else "forward"
        contenders = jax_contenders(function, config, arrays, dy_BSD if backward else None)
        failed = {"torch eager": "torch not installed"}
        if torch_side:
            inputs = [np.array(a) for a in (*arrays[1:], dy_BSD)]
            found, failed = torch_side.contenders(piece, inputs, backward=backward)
            contenders |= found
        if piece == "block" and backward:
            contenders |= products(flags.dtype, torch_side)
        say(f"measuring {piece}, {what}: {', '.join(contenders)}")
        seconds = interleaved(contenders, flags.rounds)
        rows += table_rows(piece, what, seconds, failed)
        if backward:
            record |= speedups(piece, seconds)
    # `seconds` are now those of the block, forward and backward.
    vocabulary = 2 * config.d_model * config.vocab_size
    flops = 3 * flags.tokens * (flops_per_token(config, flags.tokens) - vocabulary)
    bound = flops / (1e9 * record["matmul_gflops"])
    times = statistics.median(seconds["ours"]) / bound
    record |= {"block_arithmetic_seconds": bound, "block_times_arithmetic_bound": times}
    notes = [
        f"{flags.tokens} tokens, {flags.dtype}; over_ours: median of the rounds' ratios, from..to",
        f"the arithmetic of the block's forward+backward takes {1000 * bound:.0f} ms at "
        f"{record['matmul_gflops']:.0f} GFLOP/s, the rate of JAX's product here; ours takes "
        f"{times:.2f} times that",
        f"torch {record['torch']}",
    ]
    return Report(record, rows, notes)


def jax_contenders(function, config: ModelConfig, arrays, dy) -> dict[str, Callable[[], Any]]:
    """Calls of ours and of the plain scan; with their gradients if `dy` is given."""
    found = {}
    for name, gradient in {"ours": "lean", "plain scan": "autodiff"}.items():
        program = function(dataclasses.replace(config, integrator_gradient=gradient))
        if dy is None:
            found[name] = jax_contender(jax.jit(program), *arrays)
        else:
            found[name] = jax_contender(jax.jit(with_gradient(program)), dy, *arrays)
    return found


def products(dtype: str, torch_side) -> dict[str, Callable[[], Any]]:
    """Calls of the matrix product that gives the rate of JAX, and that of PyTorch."""
    factors = matmul_operands(jnp.dtype(dtype))
    found = {"matmul": jax_contender(jax.jit(jnp.matmul), *factors)}
    if torch_side:
        wide = [np.array(a.astype(jnp.float32)) for a in factors]
        found["matmul torch"] = torch_side.matmul(*wide)
    return found


def table_rows(piece: str, what: str, seconds, failed: dict[str, str]) -> list[dict[str, Any]]:
    """A row for each contender, also for those that failed."""
    rows, row = [], {"piece": piece, "what": what}
    for name, each in seconds.items():
        median, least = 1000 * statistics.median(each), 1000 * min(each)
        found = {"contender": name, "median_ms": median, "min_ms": least}
        if name.startswith("matmul"):
            found |= {"piece": matmul_shape(), "what": "product"}
        elif name != "ours":
            found |= zip(("over_ours", "from", "to"), ratios(each, seconds["ours"]), strict=True)
        rows.append(row | found)
    return rows + [row | {"contender": name, "note": why} for name, why in failed.items()]


def speedups(piece: str, seconds) -> dict[str, float]:
    """The record's ratios to ours, each with its range, and the rates of the products."""
    record = {}
    for name, each in seconds.items():
        slug = re.sub(r"\W", "_", name)
        if name.startswith("matmul"):
            record[f"{slug}_gflops"] = matmul_gflops(each)
        elif name != "ours":
            key = f"{piece}_speedup_vs_{slug}"
            found = ratios(each, seconds["ours"])
            record |= zip((key, f"{key}_min", f"{key}_max"), found, strict=True)
    return record


def start_torch(params, config: ModelConfig, *, skip_compile: bool):
    """PyTorch's side of the comparison; None, with a warning, if it is not installed."""
    try:
        import torch_reference
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        say("WARNING: torch is not installed, so PyTorch is left out: pip install 'inl_jax[torch]'")
        return None
    return torch_reference.TorchSide(
        params,
        config,
        skip_compile=skip_compile,
        num_threads=usable_cpus(),
        want_gpu=jax.default_backend() == "gpu",
    )


if __name__ == "__main__":
    main(integrator)
