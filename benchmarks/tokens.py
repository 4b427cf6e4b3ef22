"""How fast does text become tokens, and in how much memory?

python benchmarks/tokens.py [--megabytes 100] [--rounds 3] [--json]

Prepares the sources of Python's standard library, as often as needed, as `inl prepare` does: with
tiktoken, and with the tokenizers library alone. Each runs in a process of its own, in turns. The
ids must be equal. The BPE is trained once, before, in another process.
"""

import json
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness import Report, flags_only, main, number, ratios

from inl_jax.config import DataConfig, InputError
from inl_jax.console import say
from inl_jax.data.corpus import BATCH_BYTES, BPE_SAMPLE_BYTES, prepare
from inl_jax.limits import usable_cpus
from inl_jax.terminal.command_line import Parser
from inl_jax.tokens import fast_bpe
from inl_jax.tokens.tokenizer import Tokenizer, train_bpe

KINDS = ("tiktoken", "tokenizers")
ALONE_BYTES = 2**24  # text for the encoder alone


def tokens(parser: Parser, argv: Sequence[str]) -> Report:
    number(parser, "--megabytes", 100, "text to prepare")
    number(parser, "--rounds", 3, "measurements of each")
    parser.add_argument("--child", nargs=4, help="tokenizer, kind, text and cache of this process")
    flags = flags_only(parser, argv)
    if flags.child:
        name, kind, text, cache = flags.child
        run = trained if kind == "training" else prepared
        return Report(run(name, kind, Path(text), cache), [], [])
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        text = write_text(Path(directory) / "text", 10**6 * flags.megabytes)
        bpe = Path(directory) / "bpe"
        training = in_a_process("bpe:4096", "training", text, bpe)
        for name in ("gpt2", str(bpe)):
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
                row = {"tokenizer": best["tokenizer"], "by": kind}
                row |= {"mb_per_second": flags.megabytes / best["seconds"]}
                alone = max(run["encoder_bytes_per_second"] for run in runs)
                row |= {"encoder_mb_per_second": alone / 1e6}
                row |= {"peak_bytes": max(run["peak_bytes"] for run in runs)}
                if kind == "tiktoken":
                    row |= zip(("faster", "from", "to"), faster, strict=True)
                if name != "gpt2":
                    row |= training
                rows.append(row)
    notes = [
        "mb_per_second: of the fastest round, from the text's files to a complete cache",
        "encoder_mb_per_second: text in memory to ids in memory, on all cores",
        "peak_bytes: of the process beyond what it had after its imports",
        f"training_seconds: of {BPE_SAMPLE_BYTES / 1e6:.0f} MB at most, once, not in the others",
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
    """What `prepared` or `trained` finds, in a process of its own."""
    command = [sys.executable, __file__, "--json", "--child", name, kind, str(text), str(cache)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise InputError(done.stderr.splitlines()[-1].removeprefix("error: "))
    found = json.loads(done.stdout)
    return {key: value for key, value in found.items() if key not in ("command", "machine")}


def trained(name: str, kind: str, text: Path, directory: str) -> dict:
    """Trains a BPE and saves it in a directory; returns the seconds."""
    start = time.perf_counter()
    bpe = train_bpe(pieces(text, BPE_SAMPLE_BYTES), int(name.removeprefix("bpe:")))
    seconds = time.perf_counter() - start
    bpe.save(Path(directory))
    return {"training_seconds": seconds}


def prepared(name: str, kind: str, text: Path, cache: str) -> dict:
    """Seconds, memory and fingerprint of the corpus, and the rate of the encoder alone."""
    if kind == "tokenizers":
        fast_bpe.make = lambda backend, dtype: None
    before, start = peak(), time.perf_counter()
    corpus = prepare(DataConfig(paths=(str(text),), tokenizer=name, cache_dir=cache))
    seconds = time.perf_counter() - start
    found = {"seconds": seconds, "peak_bytes": peak() - before}
    found |= {"encoder_bytes_per_second": rate_alone(corpus.tokenizer, text)}
    return found | {"fingerprint": corpus.fingerprint, "tokenizer": corpus.tokenizer.name}


def rate_alone(tokenizer: Tokenizer, text: Path) -> float:
    """Bytes per second of the encoder on all cores."""
    texts = list(pieces(text, ALONE_BYTES))
    start = time.perf_counter()
    with ThreadPoolExecutor(usable_cpus()) as pool:
        list(pool.map(lambda piece: tokenizer.encode_batch([piece]), texts))
    return sum(len(piece.encode()) for piece in texts) / (time.perf_counter() - start)


def pieces(text: Path, size: int) -> list[str]:
    """The first `size` bytes of a folder's text, in pieces of BATCH_BYTES."""
    found = []
    for file in sorted(text.iterdir()):
        content = file.read_bytes()[:size]
        size -= len(content)
        parts = (content[i : i + BATCH_BYTES] for i in range(0, len(content), BATCH_BYTES))
        found += [part.decode(errors="ignore") for part in parts]
    return found


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main(tokens)
