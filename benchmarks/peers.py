"""How long does a training step take on the CPU beside PyTorch's, and in how much memory?

python benchmarks/peers.py [--rounds N] [--updates N] [--only CASE] [--json]

A step is forward, backward, clipping and AdamW in float32 on random tokens, without remat.
`torch` is `torch_twin.py`, eager; `attention` is ours without the integrator; `decay` ours with
decay and three iterations. They take turns in one process, and a ratio is of the same round. Peak
memory is that of a process that does nothing else, with its imports and its compiler.

Shapes: the narrow case is nanoGPT's for a CPU (characters of Shakespeare); the wide one has its
65 tokens too, so that it measures blocks; the last has GPT-2's vocabulary.
"""

import argparse
import functools
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from harness import Report, flags_only, interleaved, main, number, ratios

from inl_jax.config import DataConfig, InputError, ModelConfig, TrainConfig, with_fields
from inl_jax.limits import usable_cpus
from inl_jax.parallel.sharding import make_mesh, on, place, shardings_of
from inl_jax.terminal.command_line import Parser
from inl_jax.training.state import init_state, make_layout
from inl_jax.training.step import compile_step


def case(width, layers, heads, sequences, seq_len, vocab_size) -> TrainConfig:
    """A step of a plain transformer."""
    model = ModelConfig(
        vocab_size=vocab_size,
        d_model=width,
        num_layers=layers,
        num_iterations=0,
        d_ff=4 * width,
        max_seq_len=seq_len,
        context="attention",
        num_heads=heads,
        num_kv_heads=heads,
        remat="none",
    )
    data = DataConfig(paths=("stdlib",), seq_len=seq_len)
    return TrainConfig(model=model, data=data, batch_size=sequences, accumulate_steps=1)


CASES = {
    "128 wide": case(128, 4, 4, sequences=12, seq_len=64, vocab_size=65),
    "512 wide": case(512, 6, 8, sequences=8, seq_len=256, vocab_size=65),
    "512 wide, 50,257 tokens": case(512, 6, 8, sequences=8, seq_len=256, vocab_size=50257),
}
CONTENDERS = {
    "torch": None,
    "attention": {},
    "decay": {"model.context": "decay", "model.num_iterations": 3},
}


def peers(parser: Parser, argv: Sequence[str]) -> Report:
    number(parser, "--rounds", 7, "measurements of each")
    number(parser, "--updates", 5, "updates in a measurement")
    parser.add_argument("--only", choices=CASES, help="one case; all by default")
    parser.add_argument("--alone", choices=CONTENDERS, help=argparse.SUPPRESS)
    flags = flags_only(parser, argv)
    if flags.alone:
        step(flags.only, flags.alone)(flags.updates)
        return Report({"peak_bytes": peak_bytes()}, [], [])
    rows = [row for name in CASES if flags.only in (None, name) for row in measured(name, flags)]
    record = {
        f"{row['contender']}_{row['case']}_{what}": row[what]
        for row in rows
        if row["contender"] != "torch"
        for what in ("times_torch", "times_memory")
    }
    notes = [
        "times_torch: milliseconds per update divided by torch's, the median of "
        f"{flags.rounds} rounds of {flags.updates} updates, and the smallest and largest",
        "peak_bytes: VmHWM of a process of its own",
    ]
    return Report(record, rows, notes)


def measured(name: str, flags: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each contender in a case."""
    runs = {
        contender: functools.partial(step(name, contender), flags.updates)
        for contender in CONTENDERS
    }
    peaks = {contender: peak_alone(name, contender, flags.updates) for contender in CONTENDERS}
    seconds = interleaved(runs, flags.rounds)
    rows = []
    for contender in CONTENDERS:
        times, low, high = ratios(seconds[contender], seconds["torch"])
        rows.append(
            {
                "case": name,
                "contender": contender,
                "ms": 1e3 * statistics.median(seconds[contender]) / flags.updates,
                "times_torch": times,
                "from": low,
                "to": high,
                "peak_bytes": peaks[contender],
                "times_memory": peaks[contender] / peaks["torch"],
            }
        )
    return rows


def step(name: str, contender: str) -> Callable[[int], None]:
    """A function that makes so many updates and waits for them."""
    changes = CONTENDERS[contender]
    if changes is None:
        return torch_step(CASES[name])
    return our_step(with_fields(CASES[name], changes))


def torch_step(config: TrainConfig) -> Callable[[int], None]:
    """Updates of the twin, on as many threads as there are CPUs."""
    try:
        import torch
        from torch_twin import make_update
    except ImportError as error:
        raise InputError(f"{error}: install torch") from error
    torch.set_num_threads(usable_cpus())
    update, batch = make_update(config), torch.from_numpy(tokens(config)).long()

    def run(updates):
        for _ in range(updates):
            update(batch)

    return run


def our_step(config: TrainConfig) -> Callable[[int], None]:
    """Updates of our training step, its state donated."""
    mesh = make_mesh(config.mesh)
    layout = make_layout(config, mesh)
    fresh = functools.partial(init_state, config=config)
    with on(mesh):
        compiled = compile_step(config, mesh, layout)
        state = jax.jit(fresh, out_shardings=shardings_of(layout.state))(jax.random.key(0))
        batch, learning_rate = place(mesh, tokens(config)), np.float32(config.optim.learning_rate)

    def run(updates):
        nonlocal state
        for _ in range(updates):
            state, _ = compiled(state, batch, learning_rate)
        jax.block_until_ready(state)

    return run


def tokens(config: TrainConfig) -> np.ndarray:
    """Random sequences of one batch, int32 [B, S + 1]."""
    shape = (config.batch_size, config.data.seq_len + 1)
    return np.random.default_rng(0).integers(config.model.vocab_size, size=shape, dtype=np.int32)


def peak_alone(name: str, contender: str, updates: int) -> int:
    """The most bytes that a process holds that makes these updates and no others."""
    flags = ["--only", name, "--alone", contender, "--updates", str(updates), "--json"]
    done = subprocess.run(
        [sys.executable, __file__, *flags], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout)["peak_bytes"]


def peak_bytes() -> int:
    """The most bytes that this process has held. (`ru_maxrss` counts its parent's too.)"""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])


if __name__ == "__main__":
    main(peers)
