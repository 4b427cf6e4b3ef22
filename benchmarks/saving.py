"""How long does a save take, and what does its manifest cost of it?

python benchmarks/saving.py --config C [--section.field value ...] [--saves 5] [--json]

Saves the state of a run some times, on the disk of run_dir: how long `save` holds the training up,
how long until the checkpoint is complete, and how long hashing its files takes after that, beside
the training. Verifying them reads the same bytes.
"""

import contextlib
import functools
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from harness import Report, config_and_flags, main, number

from inl_jax.parallel.sharding import on, shardings_of
from inl_jax.planning.preflight import make_plan
from inl_jax.storage import checkpoint
from inl_jax.storage.checkpoint import Checkpoints
from inl_jax.storage.manifest import verify, write_manifest
from inl_jax.terminal.command_line import Parser
from inl_jax.training.state import init_state, split_state


def saving(parser: Parser, argv: Sequence[str]) -> Report:
    number(parser, "--saves", 5, "saves that count, after one that does not")
    config, flags = config_and_flags(parser, argv)
    config, mesh, layout = make_plan(config)
    hashing, rows = [], []

    def timed_manifest(step_dir):
        start, cpu = time.perf_counter(), time.process_time()
        write_manifest(step_dir)
        hashing.append((time.perf_counter() - start, time.process_time() - cpu))

    checkpoint.write_manifest = timed_manifest
    Path(config.run_dir).parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=Path(config.run_dir).parent))
    with on(mesh), contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        saved = stack.enter_context(contextlib.closing(Checkpoints(folder, keep_last=1)))
        fresh = functools.partial(init_state, config=config)
        shardings = shardings_of(layout.state)
        state = jax.jit(fresh, out_shardings=shardings)(jax.random.key(config.seed))
        for step in range(1, flags.saves + 2):
            jax.block_until_ready(state)
            start, cpu = time.perf_counter(), time.process_time()
            saved.save(step, **split_state(state), position={"step": step})
            held_up = time.perf_counter() - start
            saved.wait()
            seconds, cpu_seconds = hashing[-1]
            row = {"held_up": held_up, "save": time.perf_counter() - start - seconds}
            row |= {"save_cpu": time.process_time() - cpu - cpu_seconds}
            rows.append(row | {"manifest": seconds, "manifest_cpu": cpu_seconds})
        start = time.perf_counter()
        verify(folder / "checkpoints" / str(step))
        verifying = time.perf_counter() - start
        files = [file for file in (folder / "checkpoints" / str(step)).rglob("*") if file.is_file()]
        num_bytes = sum(file.stat().st_size for file in files)
    record = {name: statistics.median(row[name] for row in rows[1:]) for name in rows[0]}
    record |= {
        "manifest_share": record["manifest"] / record["save"],
        "manifest_cpu_share": record["manifest_cpu"] / record["save_cpu"],
        "verify": verifying,
        "bytes": num_bytes,
        "bytes_per_second_hashed": num_bytes / record["manifest"],
    }
    return Report(record, [], [f"{config.name}: {flags.saves} saves; seconds, medians"])


if __name__ == "__main__":
    main(saving)
