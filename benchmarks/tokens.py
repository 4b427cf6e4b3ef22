"""How fast does text become tokens, and in how much memory?

python benchmarks/tokens.py [--megabytes 100] [--rounds 3] [--json]

Prepares the sources of Python's standard library, as often as needed, as `inl prepare` does: with
tiktoken, and with the tokenizers library alone. Each runs in a process of its own, in turns. The
ids must be equal.
"""

import json
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from harness import Report, flags_only, main, number, ratios

from inl_jax.config import DataConfig
from inl_jax.console import say
from inl_jax.data.corpus import prepare
from inl_jax.terminal.command_line import Parser
from inl_jax.tokens import fast_bpe

KINDS = ("tiktoken", "tokenizers")


def tokens(parser: Parser, argv: Sequence[str]) -> Report:
    number(parser, "--megabytes", 100, "text to prepare")
    number(parser, "--rounds", 3, "measurements of each")
    parser.add_argument("--child", nargs=4, help="tokenizer, kind, text and cache of this process")
    flags = flags_only(parser, argv)
    if flags.child:
        return Report(prepared(*flags.child), [], [])
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        text = write_text(Path(directory) / "text", 10**6 * flags.megabytes)
        for name in ("gpt2", "bpe:4096"):
            found = {kind: [] for kind in KINDS}
            for i in range(flags.rounds):
                for kind in KINDS:
                    say(f"{name} by {kind}, round {i + 1}")
                    cache = Path(directory) / f"{kind}{i}"
                    found[kind].append(in_a_process(name, kind, text, cache))
            fast, slow = found.values()
            if len({run["fingerprint"] for run in fast + slow}) > 1:
                raise RuntimeError(f"{name}: the ids differ")
            faster = ratios(*([run["seconds"] for run in runs] for runs in (slow, fast)))
            for kind, runs in found.items():
                best = min(runs, key=lambda run: run["seconds"])
                row = {"tokenizer": name, "by": kind}
                row |= {"mb_per_second": flags.megabytes / best["seconds"]}
                row |= {"peak_bytes": max(run["peak_bytes"] for run in runs)}
                if kind == "tiktoken":
                    row |= zip(("faster", "from", "to"), faster, strict=True)
                rows.append(row)
    notes = [
        "mb_per_second: of the fastest round, reading and writing included; a BPE is also trained",
        "peak_bytes: of the process beyond what it had after its imports",
    ]
    return Report({}, rows, notes)


def write_text(directory: Path, size: int) -> Path:
    """Files of Python sources with about `size` bytes in all."""
    directory.mkdir()
    sources = [
        path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    ]
    written = i = 0
    while written < size:
        text = b"\n".join(sources) + b"\n# %d\n" % i
        written += (directory / f"{i}.txt").write_bytes(text[: size - written])
        i += 1
    return directory


def in_a_process(name: str, kind: str, text: Path, cache: Path) -> dict:
    """What `prepared` finds, in a process of its own."""
    command = [sys.executable, __file__, "--json", "--child", name, kind, str(text), str(cache)]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    return json.loads(done.stdout)


def prepared(name: str, kind: str, text: str, cache: str) -> dict:
    """Seconds, memory and fingerprint of the corpus."""
    if kind == "tokenizers":
        fast_bpe.make = lambda backend: None
    before, start = peak(), time.perf_counter()
    corpus = prepare(DataConfig(paths=(text,), tokenizer=name, cache_dir=cache))
    seconds = time.perf_counter() - start
    found = {"seconds": seconds, "peak_bytes": peak() - before}
    return found | {"fingerprint": corpus.fingerprint}


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main(tokens)
