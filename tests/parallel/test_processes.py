"""Real processes on loopback, each with its own CPU devices."""

import dataclasses
import re
import shutil
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import jax
import numpy as np
import pytest
from conftest import assert_same
from exported_dir import write_exported
from launched import TIMEOUT, Processes, logged
from lively import lively_params
from orbax.checkpoint import v1 as ocp

from inl_jax import evaluation, start, train
from inl_jax.config import InputError, MeshConfig
from inl_jax.data import batches as data
from inl_jax.data import corpus
from inl_jax.parallel import processes
from inl_jax.parallel.launch import Launch
from inl_jax.parallel.sharding import make_mesh
from inl_jax.sampling import decoding
from inl_jax.storage import weights
from inl_jax.storage.run_dir import locked
from inl_jax.training import step
from inl_jax.training.metrics import read_metrics
from inl_jax.training.state import make_layout, split_state
from inl_jax.watch import integrator_probe


def test_start_names_a_port_in_use_and_a_timeout_of_zero():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"127.0.0.1:{port}: process 0 cannot listen on port"):
            processes.start(Launch(f"127.0.0.1:{port}", 2, 0))
    with pytest.raises(InputError, match="peer_timeout=0: must be 1 second or more"):
        processes.start(None, peer_timeout=0)


def test_start_refuses_a_jax_without_a_store_before_it_joins(monkeypatch):
    monkeypatch.setattr("inl_jax.internals._find", lambda path: None)
    monkeypatch.setattr(jax.distributed, "initialize", pytest.fail)
    with pytest.raises(InputError, match="has no jax._src.distributed.global_state: install "):
        processes.start(Launch("127.0.0.1:1", 2, 1))


def test_single_process_needs_no_other_and_no_store(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(processes, "distributed_state", pytest.fail)
    assert processes.first() and processes.gather("a") == ["a"]
    assert processes.one_process_first(tmp_path, lambda: 7) == 7 and not list(tmp_path.iterdir())
    assert processes.end(75) == 75 and processes.end(2, "error: no") == 2
    assert capsys.readouterr().err == "error: no\n"


def test_gather_says_which_process_it_waits_for_ever_more_rarely(monkeypatch, said):
    late = [jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")] * 40 + ["late"]
    seconds = iter(range(10**6))  # each look at the clock takes one
    client = MagicMock()
    client.blocking_key_value_get.side_effect = late
    client.key_value_try_get.side_effect = jax.errors.JaxRuntimeError("NOT_FOUND")
    two = SimpleNamespace(process_id=0, num_processes=2, client=client)
    monkeypatch.setattr(processes, "_state", lambda: two)
    monkeypatch.setattr(processes.time, "monotonic", lambda: next(seconds))
    assert processes.gather("mine") == ["mine", "late"]
    assert said == [f"waiting for process 1 of 2 ({t}s so far)" for t in (10, 20, 40)]


@pytest.fixture
def as_one_of_two(monkeypatch):
    """This process as process 0 of two. Returns what happens: compiled, met, ran."""
    events = []
    two = SimpleNamespace(process_id=0, num_processes=2, client=None)
    monkeypatch.setattr(processes, "_state", lambda: two)
    monkeypatch.setattr(processes, "gather", lambda value="": events.append("met") or [value] * 2)
    return events


def test_programs_meet_the_other_processes_after_compiling_and_before_they_run(as_one_of_two):
    @jax.jit
    def program(x):
        as_one_of_two.append("compiled")  # that is, traced
        return x + 1

    def running(x):
        as_one_of_two.append("ran")
        return x + 1

    assert processes.call_together(program, 1) == 2 and as_one_of_two == ["compiled", "met"]
    as_one_of_two.clear()
    later = processes.call_later(program, 1.0)
    assert as_one_of_two == ["compiled"]
    assert later() == 2 and as_one_of_two == ["compiled", "met"]
    as_one_of_two.clear()
    compiled = processes.meeting_first(running)
    assert as_one_of_two == [] and [compiled(1), compiled(2)] == [2, 3]
    assert as_one_of_two == ["met", "ran", "ran"], "once"


def test_every_program_that_exchanges_is_met_for(
    as_one_of_two, train_config, make_corpus, text_file, monkeypatch
):
    config, mesh, met_for = train_config(), make_mesh(MeshConfig(data=1)), []

    class Met(Exception):
        pass

    def call_together(jitted, *args, **fields):
        met_for.append(jitted.__name__)
        if jitted in (decoding.read_first, decoding.start_rows):
            return None, None  # on to the loop of single tokens
        raise Met

    for module in (evaluation, integrator_probe, decoding):
        monkeypatch.setattr(module, "call_together", call_together)
    monkeypatch.setattr(start, "call_later", call_together)
    nothing_saved = SimpleNamespace(restore=lambda abstract: None)
    layout, text = make_layout(config, mesh), make_corpus(text_file)
    windows = data.eval_batches(text, seq_len=32, batch_size=8, max_sequences=8)
    tokens = np.zeros((1, 8))
    for use in (
        lambda: start.restore_or_init(config, layout, nothing_saved, text),
        lambda: evaluation.evaluate(config.model, None, windows),
        lambda: integrator_probe.measure_dynamics(config.model, None, tokens),
        lambda: decoding.generate(config.model, None, [[1]], max_new_tokens=2),
    ):
        with pytest.raises(Met):
            use()
    assert met_for == [
        "fresh_state",
        "eval_step",
        "_watch",
        "read_first",
        "start_rows",
        "decode_loop",
    ]

    traced = MagicMock()  # of the training step
    monkeypatch.setattr(step, "trace_step", lambda *_: traced)
    monkeypatch.setattr(step, "num_bytes", lambda _: 0)
    traced.lower().compile().memory_analysis.return_value = MagicMock(
        alias_size_in_bytes=0, host_alias_size_in_bytes=0
    )
    step.compile_step(config, mesh, layout)()
    assert as_one_of_two == ["met"]


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
    found = [r for r in read_metrics(run_dir) if "samples" not in r]
    return [{k: r[k] for k in keep if k in r} for r in found]


def close(found, expected):
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def from_update(step, source, **fields):
    """Copies a run as it was after `step`, without its log; returns the config to resume it."""
    config = dataclasses.replace(source, run_dir=f"{source.run_dir}-on", **fields)
    shutil.copytree(source.run_dir, config.run_dir)
    (Path(config.run_dir) / "metrics.jsonl").unlink()
    for folder in (Path(config.run_dir) / "checkpoints").iterdir():
        if folder.name != str(step):
            shutil.rmtree(folder)
    return config


def check_resumed(resumed, whole, step):
    """A resumed run first does the evaluation that is due at `step`."""
    expected = [r for r in records(whole.run_dir) if r["step"] == step and "loss" not in r]
    expected += [r for r in records(whole.run_dir) if r["step"] > step]
    close(records(resumed.run_dir), expected)


def restored(config, step):
    """The arrays of a checkpoint, as a single process reads them."""
    abstract = split_state(make_layout(config, make_mesh(MeshConfig(data=1))).state)
    folder = Path(config.run_dir) / "checkpoints" / str(step)
    found = ocp.load_checkpointables(folder, abstract)
    return [np.asarray(leaf) for leaf in jax.tree.leaves([found["params"], found["optimizer"]])]


SIX_UPDATES = dict(mesh=MeshConfig(fsdp=2, data=1), num_steps=6, eval_every=3, save_every=3)


@pytest.mark.slow  # test_sharding compares devices; the test of a killed process trains two
def test_two_processes_train_as_one_which_resumes_their_checkpoint(train_config, tmp_path, launch):
    one = train_config(run_dir=str(tmp_path / "run-1"), **SIX_UPDATES)
    # This cache_dir is relative: each of the two prepares its own copy in the folder it runs in.
    two = train_config(run_dir=str(tmp_path / "run-2"), data={"cache_dir": "cache"}, **SIX_UPDATES)
    pair = launch("2", two, 2, "--sample_every", 6, "--sample_tokens", 4)
    train(one)
    assert pair.wait() == [0, 0], pair.out(0) + pair.out(1)

    assert pair.out(1) == "", "process 1 is muted"
    assert pair.out(0).count("update 6/6  sample, drawn: ") == 1
    assert pair.out(0).count("update 1/6") == 1
    close(records(two.run_dir), records(one.run_dir))
    assert all(list((folder / "cache").glob("*/train.bin")) for folder in pair.folders)
    # Each reads its own half of every batch; together they read what a single process reads.
    samples = data.training_samples(corpus.prepare(one.data), one.data, one.seed)
    batches = data.training_batches(
        samples, position=0, batch_size=8, rows=slice(0, 8), num_batches=6
    )
    first, second = pair.rows()
    assert all(row[:3] == [0, 4, 4] for row in first) and len(first) == 6
    assert all(row[:3] == [4, 8, 4] for row in second)
    assert [a[3] + b[3] for a, b in zip(first, second, strict=True)] == [b.sum() for b in batches]

    assert_same(restored(two, 3), pair.arrays("saved-3"))
    resumed = from_update(3, two, data=one.data)
    train(resumed)
    check_resumed(resumed, one, 3)


@pytest.mark.slow
def test_two_processes_resume_the_checkpoint_of_one(train_config, launch):
    one = train_config(**SIX_UPDATES)
    train(one)
    resumed = from_update(3, one)
    pair = launch("on", resumed, 2)
    assert pair.wait() == [0, 0], pair.out(0) + pair.out(1)
    assert "resuming from update 3" in pair.out(0)
    assert_same(pair.arrays("restored-3"), restored(one, 3))
    check_resumed(resumed, one, 3)


@pytest.mark.slow
def test_two_processes_start_from_an_exported_model_as_one(train_config, tmp_path, launch):
    one = train_config(model={"param_dtype": "bfloat16"}, **SIX_UPDATES)
    exported = tmp_path / "exported"
    write_exported(exported, lively_params(one.model), one.model, shards=2)
    one = dataclasses.replace(one, init_from=str(exported))
    two = dataclasses.replace(one, run_dir=str(tmp_path / "run-2"))
    pair = launch("2", two, 2)
    train(one)
    assert pair.wait() == [0, 0], pair.out(0) + pair.out(1)
    assert f"starting from the weights of {exported}, an exported model" in pair.out(0)
    close(records(two.run_dir)[:1], records(one.run_dir)[:1])


def newest(run_dir):
    return max(int(p.name) for p in (Path(run_dir) / "checkpoints").iterdir() if p.name.isdigit())


ENDLESS = dict(
    model={"num_layers": 1, "num_iterations": 1},  # compiles faster
    num_steps=10**6,
    log_every=4,
    save_every=8,
    eval_every=0,
    mesh=MeshConfig(fsdp=2),
)


@pytest.mark.parametrize("victims", [(1,), pytest.param((0, 1), marks=pytest.mark.slow)])
def test_killed_process_ends_all(train_config, launch, victims):
    """After each kill the same command resumes the run."""
    config, reached = train_config(**ENDLESS), 0
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
        # Our message if an exchange fails; JAX's if a save waits, or if the store died.
        gone = "process 1 of 2 is gone or hangs, so all end"
        assert re.search(f"{gone}|heartbeats\\):\n1\n" if victim else "Gloo|task died", said), said
        weights.read_params(config.run_dir, config.model)
        assert newest(config.run_dir) >= reached + 8
        if reached:
            assert f"resuming from update {reached} in" in pair.out(0)
        reached = newest(config.run_dir)


@pytest.mark.slow  # test_sharding asks all processes, and those of the trainer stop one
def test_signal_to_one_process_stops_all(train_config, launch):
    config = train_config(**ENDLESS)
    pair = launch("stop", config, 2)
    pair.reach(config.run_dir, 4)
    pair.all[1].send_signal(signal.SIGTERM)
    assert pair.wait() == [75, 75], pair.out(0) + pair.out(1)
    (stopped,) = re.findall(r"stopped at update (\d+) as asked, and saved", pair.out(0))
    assert int(stopped) == newest(config.run_dir) and pair.out(1) == ""
    assert all((folder / f"saved-{stopped}").exists() for folder in pair.folders)


def test_refused_input_ends_all_processes_with_one_message(train_config, tmp_path, launch):
    config = train_config(mesh=MeshConfig(fsdp=2))
    other = launch(
        "other",
        dataclasses.replace(config, run_dir=str(tmp_path / "run-other")),
        2,
        each=lambda i: ["--seed", i],
    )
    with locked(config.run_dir):  # only process 0 takes the lock
        refused = launch("locked", config, 2)
        soon = "from inl_jax.parallel import processes\nprocesses.SAY_SECONDS = 2\n"
        lonely = launch("lonely", config, 2, "--start_timeout", 5, before=soon)
        lonely.all[0].kill()
        assert refused.wait() == [2, 2], refused.out(0) + refused.out(1)
    errors = re.findall("error: .*", refused.out(0) + refused.out(1))
    assert errors == [
        f"error: run_dir={config.run_dir}: another process trains there; wait for it, or "
        "name another run_dir"
    ]
    assert refused.out(1) == ""
    assert other.wait() == [2, 2], other.out(0) + other.out(1)
    assert re.findall("error: .*", other.out(0) + other.out(1)) == [
        "error: seed=1 on process 1 and 0 on process 0: start all with the same command and config "
        "file"
    ]
    assert lonely.wait() == [-signal.SIGKILL, 1]
    closed = r"nothing listens on port \d+ of 127.0.0.1"
    waits = rf"process 1 of 2 waits for process 0 at 127.0.0.1:\d+: {closed} \(\ds so far\); give "
    error = "error: coordinator=127.0.0.1:\\d+: process 1 of 2 did not meet the others there "
    error += rf"\(within 5 s; {closed}\): start all of them.* or --num_processes 1 .* a single "
    assert re.fullmatch(rf"({waits}.*\n)+{error}.*\n", lonely.out(1)), lonely.out(1)


@pytest.mark.slow  # XLA's wait for the first exchange, 30 s on CPUs, cannot be shortened
@pytest.mark.parametrize("traced", ["training.step.loss_fn", "evaluation.hidden_states"])
def test_processes_that_compile_a_minute_apart_exchange_all_the_same(train_config, launch, traced):
    module, _, name = traced.rpartition(".")
    late = f"""
import sys, time
from inl_jax import trainer
module = sys.modules["inl_jax.{module}"]
trace = module.{name}
def trace_late(*args, **fields):
    time.sleep(60 * (sys.argv[-1] == "1"))
    module.{name} = trace
    return trace(*args, **fields)
module.{name} = trace_late
"""
    config = train_config(**SIX_UPDATES | {"mesh": MeshConfig(data=2, fsdp=2)})
    if module == "evaluation":  # so that an evaluation is the first to exchange
        train(config)
        config = from_update(3, config)
    pair = launch("late", config, 2, devices=2, before=late)
    assert pair.wait() == [0, 0], pair.out(0) + pair.out(1)
    assert "waiting for process 1 of 2" in pair.out(0)


@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sigterm_before_the_first_update_ends_all_processes(train_config, tmp_path, launch, n):
    config = train_config(mesh=MeshConfig(fsdp=n))
    started = tmp_path / "started"
    sleep = f"""
import pathlib, time
from inl_jax.planning import preflight
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
def test_run_dir_that_one_process_cannot_write_is_refused_at_the_start(train_config, launch):
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
def test_failed_save_of_one_process_ends_all(train_config, launch):
    full = """
import pickle, resource, sys
pickle.dump = lambda *args: None  # no notes: they may be too large
if sys.argv[-1] == "1":  # no file can pass 100 kB, as if the disk were full
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
    assert pair.wait() == [28, 28], pair.out(0) + pair.out(1)
    (error,) = re.findall("error: .*", pair.out(0) + pair.out(1))
    assert f"{config.run_dir}: File too large; a checkpoint takes" in error


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
def test_divergence_ends_all_processes_with_one_message_and_finite_weights(train_config, launch):
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
    _, params = weights.read_params(config.run_dir, config.model)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@pytest.mark.slow
def test_hanging_process_ends_the_others(train_config, launch):
    config = train_config(num_steps=10**6, log_every=4, save_every=8, mesh=MeshConfig(fsdp=2))
    pair = launch("hang", config, 2, "--peer_timeout", 10)
    pair.reach(config.run_dir, 12)
    pair.all[1].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    assert pair.all[0].wait(TIMEOUT) not in (0, 2, 75)
    print(f"process 1 hung: process 0 ended after {time.monotonic() - stopped:.1f} s")
    assert time.monotonic() - stopped < 10 + 10
    assert "stopped sending heartbeats" in pair.out(0)
    weights.read_params(config.run_dir, config.model)


@pytest.mark.slow
def test_checkpoint_damaged_for_one_process_makes_all_read_the_older_one(train_config, launch):
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
    assert "damaged" not in after.out(1)  # Orbax may warn of the failed read there
    assert_same(after.arrays("restored-3"), before.arrays("saved-3"))
