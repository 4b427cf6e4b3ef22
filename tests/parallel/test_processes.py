"""Several processes: real ones on loopback, each with its own CPU devices."""

import contextlib
import dataclasses
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from inl_jax import train
from inl_jax.config import InputError, MeshConfig, to_json
from inl_jax.data import batches as data
from inl_jax.data import corpus
from inl_jax.parallel import processes
from inl_jax.parallel.processes import Launch, find_launch
from inl_jax.parallel.sharding import make_mesh
from inl_jax.training import checkpoint
from inl_jax.training.metrics import read_metrics
from inl_jax.training.state import make_layout, split_state

ROOT = Path(__file__).parents[2]
TIMEOUT = 90  # seconds for any one launch

# --- who is launched ---------------------------------------------------------------------------

JAX = {"JAX_COORDINATOR_ADDRESS": "host-0:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
TORCH = {"MASTER_ADDR": "host-0", "MASTER_PORT": "29500", "WORLD_SIZE": "8", "RANK": "5"}
TORCHRUN = TORCH | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
}
SLURM_JOB = {  # what an allocation sets, also where srun starts nothing
    "SLURM_JOB_ID": "77",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
SLURM = SLURM_JOB | {
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "node[01-02]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        (JAX, Launch("host-0:1234", 4, 3)),
        (JAX | {"JAX_LOCAL_DEVICE_IDS": "2,3"}, Launch("host-0:1234", 4, 3, (2, 3))),
        (JAX | {"JAX_NUM_PROCESSES": "1"}, None),
        (JAX | SLURM, Launch("host-0:1234", 4, 3)),
        (TORCH, Launch("host-0:29501", 8, 5)),
        (TORCHRUN, Launch("host-0:29501", 8, 5, (1,))),
        (TORCHRUN | {"CUDA_VISIBLE_DEVICES": "6"}, Launch("host-0:29501", 8, 5)),
        (TORCHRUN | {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, Launch("host-0:29501", 8, 5, (1,))),
        (TORCHRUN | SLURM, Launch("host-0:29501", 8, 5, (1,))),  # srun torchrun
        (TORCH | {"WORLD_SIZE": "1"}, None),
        ({"WORLD_SIZE": "1"}, None),
        (MPI, Launch("", 4, 3, (1,), "ompi")),
        (MPI | SLURM, Launch("", 4, 3, (1,), "ompi")),  # mpirun in a Slurm job
        (MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        (SLURM, Launch("", 8, 5, (1,), "slurm")),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0"}, Launch("", 8, 5, (), "slurm")),
        (SLURM | {"SLURM_STEP_NUM_NODES": "8"}, Launch("", 8, 5, (), "slurm")),  # a task per node
        (SLURM | {"MASTER_ADDR": "host-0"}, Launch("", 8, 5, (1,), "slurm")),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "a:1"}, Launch("a:1", 8, 5, (1,))),
        (SLURM_JOB, None),  # a batch script without srun
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),  # the shell of salloc, or srun -n 1
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}, None),
    ],
)
def test_a_launcher_with_several_tasks_is_found(env, expected):
    assert find_launch(env) == expected
    assert find_launch(env, num_processes=1) is None


def test_flags_stand_above_the_environment():
    flags = dict(coordinator="b:9", num_processes=2, process_id=1)
    for env in ({}, JAX, SLURM, {"RANK": "3"}):
        assert find_launch(env, **flags) == Launch("b:9", 2, 1)
    assert find_launch(JAX, process_id=0) == Launch("host-0:1234", 4, 0)


@pytest.mark.parametrize(
    ("env", "flags", "named"),
    [
        ({"JAX_NUM_PROCESSES": "4"}, {}, "num_processes=4 without --coordinator or JAX_COORD"),
        ({}, {"process_id": 1}, "process_id=1 without .*--num_processes or JAX_NUM_PROCESSES"),
        ({}, {"coordinator": "a:1", "num_processes": 2}, "a:1, num_processes=2 without --process_"),
        ({"WORLD_SIZE": "8", "RANK": "5"}, {}, "WORLD_SIZE=8, RANK=5 without MASTER_ADDR, MASTER"),
        ({"MASTER_ADDR": "host-0"}, {}, "_ADDR=host-0 without MASTER_PORT, WORLD_SIZE, RANK"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, {}, "OMPI_COMM_WORLD_SIZE=2 without OMPI_COMM_WORLD_RANK"),
        (MPI | {"OMPI_MCA_orte_hnp_uri": None}, {}, "without --coordinator or JAX_COORDINATOR"),
        (SLURM | {"SLURM_STEP_NODELIST": None}, {}, "JOB_ID=77.* without SLURM_STEP_NODELIST"),
        (JAX | {"JAX_PROCESS_ID": "4"}, {}, "process_id=4: must lie between 0 and num_processes=4"),
        (JAX | {"JAX_PROCESS_ID": "one"}, {}, "process_id=one: must be a whole number"),
        (JAX | {"JAX_COORDINATOR_ADDRESS": "host"}, {}, "coordinator=host: must be host:port"),
    ],
)
def test_what_is_missing_or_impossible_is_named(env, flags, named):
    with pytest.raises(InputError, match=named):
        find_launch({k: v for k, v in env.items() if v is not None}, **flags)


def test_a_port_in_use_and_no_time_are_named():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"127.0.0.1:{port}: process 0 cannot listen on port"):
            processes.start(Launch(f"127.0.0.1:{port}", 2, 0))
    with pytest.raises(InputError, match="peer_timeout=0: must be 1 second or more"):
        processes.start(None, peer_timeout=0)


def test_alone_everything_answers_at_once(tmp_path, capsys):
    assert processes.first() and processes.gather("a") == ["a"]
    assert processes.once_for_each_copy(tmp_path, lambda: 7) == 7 and not list(tmp_path.iterdir())
    assert processes.end(75) == 75 and processes.end(2, "error: no") == 2
    assert capsys.readouterr().err == "error: no\n"


# --- real processes ----------------------------------------------------------------------------

# scripts/train.py, that writes down the rows it reads and its part of what is saved and restored.
WORKER = f"""
import json, os, pickle, sys
sys.path.insert(0, {str(ROOT / "scripts")!r})
import jax
import numpy as np
import train as script
from inl_jax import checkpoint, data

FOLDER = sys.argv.pop(1)
read, Checkpoints = data.training_batches, checkpoint.Checkpoints
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
    note(f"saved-{{step}}", [params, optimizer])
    save(self, step, params, optimizer, **fields)

def spying_restore(self, *args, **fields):
    found = restore(self, *args, **fields)
    if found:
        note("restored-" + str(found["step"]), [found["params"], found["optimizer"]])
    return found

data.training_batches = spying_read
Checkpoints.save, Checkpoints.restore = spying_save, spying_restore
sys.exit(script.main())
"""


class Processes:
    """The processes of one launch on loopback, process 0 first."""

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
                f"from inl_jax.config import from_json\nconfig = from_json({to_json(config)!r})"
            )
            place = ["--coordinator", f"127.0.0.1:{port}", "--num_processes", n, "--process_id", i]
            command = [
                sys.executable,
                "-c",
                before + WORKER,
                own,
                "--config",
                path,
                *args,
                *each(i),
            ]
            env = os.environ | {
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(devices),
                "PYTHONPATH": str(ROOT),
            }
            with open(own / "log", "wb") as log:
                self.all.append(
                    subprocess.Popen(
                        [*map(str, command), *map(str, place if n > 1 else ())],
                        env=env,
                        cwd=own,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )

    def out(self, i):
        """What a process said, without gloo's own greeting."""
        lines = (self.folders[i] / "log").read_text(errors="replace").splitlines(keepends=True)
        return "".join(line for line in lines if not line.startswith("[Gloo]"))

    def wait(self):
        """Exit codes."""
        until = time.monotonic() + TIMEOUT
        with contextlib.suppress(subprocess.TimeoutExpired):
            return [p.wait(max(0.1, until - time.monotonic())) for p in self.all]
        pytest.fail("they hang: " + "\n".join(self.out(i)[-2000:] for i in range(len(self.all))))

    def reach(self, run_dir, step):
        """Returns when the run has logged `step`."""
        until = time.monotonic() + TIMEOUT
        while logged(run_dir) < step:
            assert all(p.poll() is None for p in self.all), self.out(0)
            assert time.monotonic() < until, self.out(0)
            time.sleep(0.05)

    def rows(self):
        """For each process (start, stop, number of rows, sum of tokens) of each batch it read."""
        files = [folder / "rows" for folder in self.folders]
        return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]

    def arrays(self, name):
        """What the processes noted under `name`, put together from all their devices' parts."""
        noted = [pickle.loads((folder / name).read_bytes()) for folder in self.folders]
        whole = []
        for leaves in zip(*noted, strict=True):
            shape, parts = leaves[0][0], [part for _, parts in leaves for part in parts]
            array, filled = np.empty(shape, parts[0][1].dtype), np.zeros(shape, bool)
            for index, value in parts:
                array[index], filled[index] = value, True
            assert filled.all()
            whole.append(array)
        return whole


@pytest.fixture
def launch(tmp_path):
    """Starts processes: `launch(name, config, n, *args, ...)`; none outlives the test."""
    started = []

    def start(name, *args, **fields):
        started.append(Processes(tmp_path / name, *args, **fields))
        return started[-1]

    yield start
    for process in (p for group in started for p in group.all):
        process.kill()
        process.wait()


def records(run_dir):
    keep = ("step", "loss", "grad_norm", "validation_loss", "samples_seen")
    return [{k: r[k] for k in keep if k in r} for r in read_metrics(run_dir)]


def close(found, expected):
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def same(a, b):
    assert len(a) == len(b) > 20
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def copy_from_update(source, target, step):
    """A run as it was after `step`, in another directory."""
    shutil.copytree(source, target)
    for folder in (Path(target) / "checkpoints").iterdir():
        if folder.name != str(step):
            shutil.rmtree(folder)


def restored(config, step):
    """All arrays of a checkpoint, as one process reads them."""
    abstract = split_state(make_layout(config, make_mesh(MeshConfig(data=1))))
    folder = Path(config.run_dir) / "checkpoints" / str(step)
    found = ocp.load_checkpointables(folder, abstract)
    return [np.asarray(leaf) for leaf in jax.tree.leaves([found["params"], found["optimizer"]])]


def test_two_processes_train_as_one_and_go_on_from_each_others_checkpoints(
    train_config, tmp_path, launch
):
    # For two, a cache_dir below the directory that a process runs in: each prepares its own copy.
    fields = dict(mesh=MeshConfig(fsdp=2, data=1), num_steps=6, eval_every=3, save_every=3)
    one = train_config(run_dir=str(tmp_path / "run-1"), **fields)
    two = train_config(run_dir=str(tmp_path / "run-2"), data={"cache_dir": "cache"}, **fields)
    pair = launch("2", two, 2, "--sample_every", 6, "--sample_tokens", 4)
    train(one)
    assert pair.wait() == [0, 0], pair.out(0) + pair.out(1)

    assert pair.out(1) == "", "only process 0 speaks"
    assert pair.out(0).count("sample at update") == 1 and pair.out(0).count("update 1/6") == 1
    close(records(two.run_dir), records(one.run_dir))
    assert all(list((folder / "cache").glob("*/train.bin")) for folder in pair.folders)
    # Each read its own half of every batch, which together are what one process reads.
    samples = data.training_samples(corpus.prepare(one.data), one.data, one.seed)
    batches = data.training_batches(
        samples, position=0, batch_size=8, rows=slice(0, 8), num_batches=6
    )
    first, second = pair.rows()
    assert all(row[:3] == [0, 4, 4] for row in first) and len(first) == 6
    assert all(row[:3] == [4, 8, 4] for row in second)
    assert [a[3] + b[3] for a, b in zip(first, second, strict=True)] == [b.sum() for b in batches]

    # From update 3 on, by the other number of processes: the same bits, then the same losses.
    one_on, two_on = (
        dataclasses.replace(c, run_dir=f"{c.run_dir}-on", data=one.data) for c in (one, two)
    )
    for before, after in ((one, one_on), (two, two_on)):
        copy_from_update(before.run_dir, after.run_dir, 3)
        (Path(after.run_dir) / "metrics.jsonl").unlink()
    pair_on = launch("on", one_on, 2)
    same(restored(two, 3), pair.arrays("saved-3"))
    train(two_on)
    assert pair_on.wait() == [0, 0], pair_on.out(0)
    assert "resuming from update 3" in pair_on.out(0)
    same(pair_on.arrays("restored-3"), restored(one, 3))
    caught_up = [r for r in records(one.run_dir) if r["step"] == 3 and "loss" not in r]
    expected = caught_up + [r for r in records(one.run_dir) if r["step"] > 3]
    for config in (one_on, two_on):
        close(records(config.run_dir), expected)


def logged(run_dir):
    return max((r["step"] for r in read_metrics(run_dir)), default=0)


def newest(run_dir):
    return max(int(p.name) for p in (Path(run_dir) / "checkpoints").iterdir() if p.name.isdigit())


@pytest.mark.parametrize("victims", [(1,), pytest.param((0, 1), marks=pytest.mark.slow)])
def test_a_dead_process_ends_all_and_a_signal_to_one_stops_all(train_config, launch, victims):
    """SIGKILL to a process, the same command again, and so on; at last SIGTERM to process 1."""
    config = train_config(
        num_steps=10**6, log_every=4, save_every=8, eval_every=0, mesh=MeshConfig(fsdp=2)
    )
    reached = 0
    for victim in victims:
        pair = launch(f"kill-{victim}", config, 2, "--peer_timeout", 10)
        pair.reach(config.run_dir, logged(config.run_dir) + 20)
        pair.all[victim].kill()
        killed = time.monotonic()
        codes = pair.wait()
        print(f"process {victim} killed: all ended after {time.monotonic() - killed:.1f} s")
        assert time.monotonic() - killed < 10 + 10 + processes.ANSWER_SECONDS
        assert codes[victim] == -signal.SIGKILL and codes[1 - victim] not in (0, 2, 75), codes
        said = pair.out(0) + pair.out(1)
        # Ours where an exchange fails; JAX's where a save waits, or where the store died.
        gone = "process 1 of 2 is gone or hangs, so all end"
        assert re.search(f"{gone}|heartbeats\\):\n1\n" if victim else "Gloo|task died", said), said
        checkpoint.read_params(config.run_dir, config.model)
        assert newest(config.run_dir) >= reached + 8
        if reached:
            assert f"resuming from update {reached} in" in pair.out(0)
        reached = newest(config.run_dir)

    pair = launch("stop", config, 2)
    pair.reach(config.run_dir, logged(config.run_dir) + 4)
    pair.all[1].send_signal(signal.SIGTERM)
    assert pair.wait() == [75, 75], pair.out(0) + pair.out(1)
    (stopped,) = re.findall(r"stopped at update (\d+) as asked, and saved", pair.out(0))
    assert int(stopped) == newest(config.run_dir) > reached and pair.out(1) == ""
    assert all((folder / f"saved-{stopped}").exists() for folder in pair.folders)


def test_a_mistake_of_any_process_ends_all_with_one_message(train_config, tmp_path, launch):
    config = train_config(mesh=MeshConfig(fsdp=2))
    other = launch(
        "other",
        dataclasses.replace(config, run_dir=str(tmp_path / "run-other")),
        2,
        each=lambda i: ["--seed", i],
    )
    with checkpoint.locked(config.run_dir):  # only process 0 can notice
        locked = launch("locked", config, 2)
        lonely = launch("lonely", config, 2, "--start_timeout", 8)
        lonely.all[0].kill()
        assert locked.wait() == [2, 2], locked.out(0) + locked.out(1)
    errors = re.findall("error: .*", locked.out(0) + locked.out(1))
    assert errors == [f"error: run_dir={config.run_dir}: another process trains there"]
    assert locked.out(1) == ""
    assert other.wait() == [2, 2], other.out(0) + other.out(1)
    assert re.findall("error: .*", other.out(0) + other.out(1)) == [
        "error: seed=1 on process 1 and 0 on process 0: start all with the same command and config "
        "file"
    ]
    assert lonely.wait() == [-signal.SIGKILL, 1]
    assert re.fullmatch(
        r"error: coordinator=127.0.0.1:\d+: process 1 of 2 did not meet the others there "
        r"\(within 8 s\): start all of them.*\n",
        lonely.out(1),
    ), lonely.out(1)


@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_signal_before_the_first_update_ends_all_as_one_that_comes_later(
    train_config, tmp_path, launch, n
):
    config = train_config(mesh=MeshConfig(fsdp=n))
    started = tmp_path / "started"
    sleep = f"""
import pathlib, time
from inl_jax import preflight
preflight.prepare = lambda *args, **fields: (pathlib.Path({str(started)!r}).touch(), time.sleep(99))
"""
    group = launch("early", config, n, before=sleep)
    until = time.monotonic() + TIMEOUT
    while not started.exists() and time.monotonic() < until:
        time.sleep(0.1)
    group.all[-1].send_signal(signal.SIGTERM)
    assert group.wait() == [75] * n, group.out(0)
    assert "terminated; nothing more was saved" in group.out(n - 1)
    assert n == 1 or "process 1 of 2 ends all with exit code 75" in group.out(0)
    assert not (Path(config.run_dir) / "checkpoints").exists()


@pytest.mark.slow
def test_a_run_directory_that_one_process_cannot_write_is_refused_at_the_start(
    train_config, launch
):
    read_only = """
import errno, pathlib, sys
touch = pathlib.Path.touch
def refuse(self, *args, **fields):
    if sys.argv[-1] == "1" and ".shared-" in self.name:
        raise OSError(errno.EROFS, "Read-only file system")
    touch(self, *args, **fields)
pathlib.Path.touch = refuse
"""
    config = train_config(mesh=MeshConfig(fsdp=2))
    pair = launch("read-only", config, 2, before=read_only)
    assert pair.wait() == [2, 2], pair.out(0) + pair.out(1)
    (error,) = re.findall("error: .*", pair.out(0) + pair.out(1))
    assert f"{config.run_dir}: process 1 cannot write there (Read-only file system)" in error


@pytest.mark.slow
def test_a_save_that_fails_on_one_process_ends_all(train_config, launch):
    full = """
import pickle, resource, sys
pickle.dump = lambda *args: None  # the notes of this test
if sys.argv[-1] == "1":  # no file beyond 100 kB, as on a disk that is full
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
"""
    config = train_config(
        model={"d_model": 64, "d_ff": 256},
        num_steps=10**6,
        save_every=10,
        eval_every=0,
        mesh=MeshConfig(fsdp=2),
    )
    pair = launch("full", config, 2, before=full)
    assert pair.wait() == [1, 1], pair.out(0) + pair.out(1)
    (error,) = re.findall("error: .*", pair.out(0) + pair.out(1))
    assert f"{config.run_dir}: a save failed (" in error and "File too large" in error


@pytest.mark.slow
def test_four_processes_and_a_tensor_axis_across_processes_train_as_one(
    train_config, tmp_path, launch
):
    runs = {}
    for n, devices, tensor in ((1, 4, 2), (4, 1, 2), (2, 2, 4)):
        config = train_config(
            mesh=MeshConfig(fsdp=4 // tensor, tensor=tensor),
            sample_every=8,
            run_dir=str(tmp_path / f"run-{n}"),
            sample_tokens=4,
        )
        group = launch(str(n), config, n, devices=devices)
        assert set(group.wait()) == {0}, [group.out(i) for i in range(n)]
        runs[n] = group, records(config.run_dir)
    close(runs[4][1], runs[1][1])
    close(runs[2][1], runs[1][1])
    read = [{tuple(row[:3]) for row in rows} for rows in runs[4][0].rows()]
    assert read == [{(0, 4, 4)}, {(0, 4, 4)}, {(4, 8, 4)}, {(4, 8, 4)}]
    assert [{tuple(r[:3]) for r in rows} for rows in runs[2][0].rows()] == [{(0, 8, 8)}] * 2


@pytest.mark.slow
def test_a_diverging_run_ends_all_with_one_message_and_good_weights(train_config, launch):
    config = train_config(
        num_steps=20,
        max_nonfinite_steps=3,
        eval_every=0,
        mesh=MeshConfig(fsdp=2),
        optim={"learning_rate": 1e30, "warmup_steps": 0},
    )
    pair = launch("diverge", config, 2)
    assert pair.wait() == [3, 3], pair.out(0) + pair.out(1)
    (error,) = re.findall("error: .*", pair.out(0) + pair.out(1))
    assert "3 updates in a row" in error
    _, params = checkpoint.read_params(config.run_dir, config.model)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_others(train_config, launch):
    config = train_config(num_steps=10**6, log_every=4, save_every=8, mesh=MeshConfig(fsdp=2))
    pair = launch("hang", config, 2, "--peer_timeout", 10)
    pair.reach(config.run_dir, 12)
    pair.all[1].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    assert pair.all[0].wait(TIMEOUT) not in (0, 2, 75)
    print(f"process 1 hung: process 0 ended after {time.monotonic() - stopped:.1f} s")
    assert time.monotonic() - stopped < 10 + 10
    assert "stopped sending heartbeats" in pair.out(0)
    checkpoint.read_params(config.run_dir, config.model)


@pytest.mark.slow
def test_bytes_that_are_bad_for_one_process_make_all_take_the_older_checkpoint(
    train_config, launch
):
    config = train_config(num_steps=6, save_every=3, eval_every=0, mesh=MeshConfig(fsdp=2))
    before = launch("before", config, 2)
    assert before.wait() == [0, 0], before.out(0)
    folder = Path(config.run_dir) / "checkpoints" / "6" / "optimizer" / "ocdbt.process_1"
    files = [file for file in folder.glob("d/*") if file.is_file()]
    assert files
    for file in files:
        file.write_bytes(b"junk")
    after = launch("after", config, 2)
    assert after.wait() == [0, 0], after.out(0) + after.out(1)
    assert "checkpoint 6 could not be read and was moved to" in after.out(0)
    assert "resuming from update 3" in after.out(0)
    assert "damaged" not in after.out(1)  # it may hold a warning of Orbax's about the broken read
    same(after.arrays("restored-3"), before.arrays("saved-3"))
