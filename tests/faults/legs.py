"""Legs of a tiny run: processes that train it until they end or are killed."""

import contextlib
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from inl_jax.config import DataConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig
from inl_jax.config_file import to_json
from inl_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
TIMEOUT = 400  # seconds after which a leg counts as hung, on a busy machine too

# `inl train`. To read a batch takes PACE seconds; batch number STALL never comes. A digest of each
# state that it saves or restores is printed, the same for every number of devices.
WORKER = """
import contextlib, hashlib, sys, time
import jax
from inl_jax.cli.main import main
from inl_jax.data import batches
from inl_jax.parallel.sharding import fetch
from inl_jax.storage.checkpoint import Checkpoints

PACE, STALL = float(sys.argv.pop(1)), int(sys.argv.pop(1))
read, save, restore = batches.training_batches, Checkpoints.save, Checkpoints.restore

def slowly(*args, **fields):
    for number, batch in enumerate(read(*args, **fields), 1):
        time.sleep(PACE if number != STALL else 10**6)
        yield batch

def note(what, step, *trees):
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(trees):
        digest.update(fetch(leaf).tobytes())
    with contextlib.suppress(OSError):  # the console may be what fails
        print(what, step, digest.hexdigest(), flush=True)

def noting_save(self, step, params, optimizer=None, **fields):
    note("saved", step, params, optimizer)
    save(self, step, params, optimizer, **fields)

def noting_restore(self, *args, **fields):
    found = restore(self, *args, **fields)
    if found:
        note("restored", found["step"], found["params"], found["optimizer"])
    return found

batches.training_batches = slowly
Checkpoints.save, Checkpoints.restore = noting_save, noting_restore
main("train")
"""

# What the clock decides in a record.
OF_THE_CLOCK = {"time", "elapsed", "seconds_per_step", "seconds_left", "tokens_per_second", "mfu"}
OF_THE_CLOCK |= {"input_wait", "peak_memory", "energy_kwh", "validation_seconds"}


def tiny_config(folder, **fields):
    """A run of milliseconds an update, on bytes of a text that is written beside it."""
    text = folder / "text.txt"
    if not text.exists():
        words = "the quick brown fox jumps over the lazy dog while wizards brew potions".split()
        lines = (" ".join(words[i * j % len(words)] for j in range(1, 12)) for i in range(300))
        text.write_text("\n".join(lines))
    return TrainConfig(
        model=ModelConfig(
            vocab_size=260,
            d_model=16,
            num_layers=2,
            num_iterations=2,
            d_ff=32,
            max_seq_len=32,
            controller_width=8,
            dropout=0.1,
            remat="none",
        ),
        data=DataConfig(
            paths=(str(text),),
            tokenizer="bytes",
            seq_len=32,
            validation_fraction=0.1,
            cache_dir=str(folder / "cache"),
        ),
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=2),
        **{
            "mesh": MeshConfig(),
            "run_dir": str(folder / "run"),
            "num_steps": 100,
            "batch_size": 4,
            "log_every": 1,
            "eval_every": 5,
            "eval_sequences": 8,
            "save_every": 2,
            "sample_every": 0,
            "keep_last": 2,
        }
        | fields,
    )


class Leg:
    """The processes of one start of a run.

    Args:
      config: what they train.
      processes: how many.
      devices: CPU devices of each.
      pace: seconds that reading a batch takes.
      stalls: for each process, the number of the batch whose reading never ends; 0 for none.
      prefix: a command that starts each process.
      variables: of the environment.
      settings: of `subprocess.Popen`.
    """

    number = 0

    def __init__(
        self,
        config,
        *,
        processes=1,
        devices=1,
        pace=0.0,
        stalls=(0, 0),
        prefix=(),
        variables=(),
        **settings,
    ):
        Leg.number += 1
        folder = Path(config.data.cache_dir).with_name(f"leg-{Leg.number}")
        folder.mkdir()
        path = folder / "config.py"
        path.write_text(
            f"from inl_jax.config_file import from_json\nconfig = from_json({to_json(config)!r})\n"
        )
        env = (
            os.environ
            | {
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(devices),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "PYTHONPATH": str(ROOT),
            }
            | dict(variables)
        )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.config, self.all, self.logs = config, [], []
        for i in range(processes):
            command = [*prefix, sys.executable, "-c", WORKER, pace, stalls[i], "--config", path]
            if processes > 1:
                command += ["--coordinator", f"127.0.0.1:{port}", "--num_processes", processes]
                command += ["--process_id", i, "--peer_timeout", 10]
            self.logs.append(folder / f"log-{i}")
            with open(self.logs[-1], "wb") as log:
                self.all.append(
                    subprocess.Popen(
                        list(map(str, command)),
                        env=env,
                        stdin=subprocess.DEVNULL,
                        **{"stdout": log, "stderr": subprocess.STDOUT} | settings,
                    )
                )

    def out(self, i=0):
        """What process i printed."""
        return self.logs[i].read_text(errors="replace")

    def wait(self):
        """The exit codes, once all processes have ended."""
        until = time.monotonic() + TIMEOUT
        try:
            return [process.wait(max(0.1, until - time.monotonic())) for process in self.all]
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            raise AssertionError(f"does not end: {self.out()[-2000:]}") from None

    def signal(self, number, among=slice(None)):
        """Sends a signal to all processes, or to some."""
        for process in self.all[among]:
            process.send_signal(number)

    def grown(self):
        """Waits until the log has a new record; returns whether it has, and the leg still runs."""
        path = Path(self.config.run_dir) / "metrics.jsonl"
        size, until = _size(path), time.monotonic() + TIMEOUT
        while _size(path) <= size and time.monotonic() < until:
            if any(process.poll() is not None for process in self.all):
                return False
            time.sleep(0.005)
        return True

    def digests(self, what):
        """The digest of each state that process 0 saved or restored, by its step."""
        found = re.findall(rf"^{what} (\d+) (\w{{64}})$", self.out(), re.MULTILINE)
        return {int(step): digest for step, digest in found}


def _size(path):
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def log_of(run_dir):
    """The records of a run without what the clock decides."""
    return [
        {
            key: "NaN" if isinstance(value, float) and math.isnan(value) else value
            for key, value in record.items()
            if key not in OF_THE_CLOCK
        }
        for record in read_metrics(run_dir)
    ]


def temporary_files(run_dir):
    """Files and directories that only a save under way may have."""
    return [
        str(path)
        for path in Path(run_dir).rglob("*")
        if "tmp" in path.name or re.fullmatch(r"\..+\.\d+", path.name)
    ]
