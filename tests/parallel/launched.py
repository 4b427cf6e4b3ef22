"""Launches real processes on loopback, each with its own CPU devices, and reads what they did."""

import contextlib
import json
import os
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from inl_jax.config_file import to_json
from inl_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
TIMEOUT = 240  # seconds after which a launch counts as hung, on a busy machine too

# `inl train`. It also notes, in FOLDER, the rows it reads and its shards of each saved and
# restored array.
WORKER = """
import json, os, pickle, sys
import jax
import numpy as np
from inl_jax.cli.main import main
from inl_jax.data import batches
from inl_jax.storage import checkpoint

FOLDER = sys.argv.pop(1)
read, Checkpoints = batches.training_batches, checkpoint.Checkpoints
save, restore = Checkpoints.save, Checkpoints.restore

def spying_read(samples, *, rows, **fields):
    for batch in read(samples, rows=rows, **fields):
        with open(FOLDER + "/rows", "a") as file:
            print(json.dumps([rows.start, rows.stop, len(batch), int(batch.sum())]), file=file)
        yield batch

def note(name, tree):
    parts = [[(s.index, np.asarray(s.data)) for s in leaf.addressable_shards]
             for leaf in jax.tree.leaves(tree)]
    with open(FOLDER + "/" + name, "wb") as file:
        pickle.dump([(leaf.shape, part) for leaf, part in zip(jax.tree.leaves(tree), parts)], file)

def spying_save(self, step, params, optimizer=None, **fields):
    note(f"saved-{step}", [params, optimizer])
    save(self, step, params, optimizer, **fields)

def spying_restore(self, *args, **fields):
    found = restore(self, *args, **fields)
    if found:
        note("restored-" + str(found["step"]), [found["params"], found["optimizer"]])
    return found

batches.training_batches = spying_read
Checkpoints.save, Checkpoints.restore = spying_save, spying_restore
main("train")
"""


class Processes:
    """The processes of one launch, process 0 first.

    Args:
      folder: where each process gets a folder of its own, in which it runs.
      config: what they train.
      n: how many processes.
      *args: flags for all of them.
      devices: CPU devices of each process.
      each: flags for process i.
      before: code that runs before training.
    """

    def __init__(self, folder, config, n, *args, devices=1, each=lambda i: (), before=""):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.folders = [folder / str(i) for i in range(n)]
        self.all = []
        for i, own in enumerate(self.folders):
            own.mkdir(parents=True)
            path = own / "config.py"
            path.write_text(
                "from inl_jax.config_file import from_json\n"
                f"config = from_json({to_json(config)!r})\n"
            )
            flags = ["--config", path, *args, *each(i)]
            if n > 1:  # last, so that code in `before` finds its process id in sys.argv[-1]
                flags += ["--coordinator", f"127.0.0.1:{port}"]
                flags += ["--num_processes", n, "--process_id", i]
            command = [sys.executable, "-c", before + WORKER, own, *flags]
            env = os.environ | {
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(devices),
                "PYTHONPATH": str(ROOT),
                "http_proxy": "http://127.0.0.1:9",  # where nothing listens: it is not asked
            }
            with open(own / "log", "wb") as log:
                self.all.append(
                    subprocess.Popen(
                        [*map(str, command)],
                        env=env,
                        cwd=own,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )

    def out(self, i):
        """The output of process i, without the lines that gloo prints when it connects."""
        lines = (self.folders[i] / "log").read_text(errors="replace").splitlines(keepends=True)
        return "".join(line for line in lines if not line.startswith("[Gloo]"))

    def wait(self):
        """The exit codes, once all have ended."""
        until = time.monotonic() + TIMEOUT
        with contextlib.suppress(subprocess.TimeoutExpired):
            return [p.wait(max(0.1, until - time.monotonic())) for p in self.all]
        pytest.fail(
            "some do not end: " + "\n".join(self.out(i)[-2000:] for i in range(len(self.all)))
        )

    def reach(self, run_dir, step):
        """Waits until the run has logged `step`."""
        until = time.monotonic() + TIMEOUT
        while logged(run_dir) < step:
            assert all(p.poll() is None for p in self.all), self.out(0)
            assert time.monotonic() < until, self.out(0)
            time.sleep(0.05)

    def rows(self):
        """[start, stop, number of rows, sum of tokens] of each batch, for each process."""
        files = [folder / "rows" for folder in self.folders]
        return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]

    def arrays(self, name):
        """The arrays that the processes noted under `name`, joined from all their shards."""
        noted = [pickle.loads((folder / name).read_bytes()) for folder in self.folders]
        whole = []
        for leaves in zip(*noted, strict=True):
            shape, parts = leaves[0][0], [part for _, parts in leaves for part in parts]
            array, filled = np.empty(shape, parts[0][1].dtype), np.zeros(shape, bool)
            for index, value in parts:
                array[index], filled[index] = value, True
            assert filled.all()
            whole.append(array)
        assert len(whole) > 20
        return whole


def logged(run_dir):
    return max((r["step"] for r in read_metrics(run_dir)), default=0)
