"""How long does a training step take on the CPU beside PyTorch's, and in how much memory?

python benchmarks/peers.py [--rounds N] [--updates N] [--only CASE] [--json]

A step is forward, backward, clipping and AdamW in float32 on random tokens, with `remat none`.
`torch` is `torch_twin.py`, eager; `attention` and `gated` are ours without the integrator; `decay`
ours with decay and three iterations. They take turns in one process, and a ratio is of the same
round. Peak memory is that of a process that does nothing else and imports one side alone, with its
compiler.

Shapes: the narrow case is nanoGPT's for a CPU (characters of Shakespeare); the wide one has its
65 tokens too, so that it measures blocks; the last has GPT-2's vocabulary.
"""

import argparse
import functools
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import Report, flags_only, interleaved, main, number, ratios
from peer_step import CASES, CONTENDERS, step

from inl_jax.terminal.command_line import Parser


def peers(parser: Parser, argv: Sequence[str]) -> Report:
    number(parser, "--rounds", 7, "measurements of each")
    number(parser, "--updates", 5, "updates in a measurement")
    parser.add_argument("--only", choices=CASES, help="one case; all by default")
    flags = flags_only(parser, argv)
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
        "peak_bytes: VmHWM of a process of its own, after two updates",
    ]
    return Report(record, rows, notes)


def measured(name: str, flags: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each contender in a case."""
    runs = {
        contender: functools.partial(step(name, contender), flags.updates)
        for contender in CONTENDERS
    }
    peaks = {contender: peak_alone(name, contender) for contender in CONTENDERS}
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


def peak_alone(name: str, contender: str) -> int:
    """The most bytes that a process holds that makes updates and nothing else.

    Two updates, because PyTorch has no moments before the end of the first.
    """
    program = Path(__file__).with_name("peer_step.py")
    done = subprocess.run(
        [sys.executable, program, name, contender, "2"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return int(done.stdout.splitlines()[-1])  # below the lines of the compiler


if __name__ == "__main__":
    main(peers)
