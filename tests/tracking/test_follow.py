import json
import sqlite3
import sys
import threading
from types import SimpleNamespace

import pytest

from inl_jax.tracking.follow import Tail, follow

SAMPLES = [{"prompt": "a", "greedy": "ab", "sampled": "a hf_abcdefghijklmnopqrstuvwx"}]


@pytest.fixture
def run_dir(tmp_path):
    """A run directory without records, whose config holds secrets."""
    folder = tmp_path / "run"
    (folder / "trackers").mkdir(parents=True)
    (folder / "trackers" / "id.json").write_text('{"id": "run-1"}')
    config = {"data": {"paths": ["https://ann:pa55word@host/text"]}, "api_key": "0123456789"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "env.json").write_text('{"starts": [{"host": "node0"}, {"host": "node1"}]}')
    return folder


def add(run_dir, *steps, resumed_from=0, loss=1):
    """Adds the records of updates, and all that comes with every second one."""
    with open(run_dir / "metrics.jsonl", "a") as file:
        if resumed_from:
            file.write(json.dumps({"resumed_from": resumed_from}) + "\n")
        for step in steps:
            records = [{"loss": loss / step}]
            if step % 2 == 0:
                records += [{"validation_loss": 2 / step}, {"samples": SAMPLES}]
            for record in records:
                file.write(json.dumps({"step": step} | record) + "\n")


def send(name, run_dir, *steps, resumed_from=0):
    """Follows a run that resumes from an update and makes `steps`."""
    metrics = run_dir / "metrics.jsonl"
    add(run_dir, resumed_from=resumed_from)
    offset = metrics.stat().st_size if metrics.exists() else 0
    add(run_dir, *steps)
    ended = threading.Event()
    ended.set()
    said = []
    follow(name, run_dir, ended, said.append, project="p", step=resumed_from, offset=offset)
    assert len(said) == 1


@pytest.mark.parametrize("known", [None, {"loss": 2}], ids=["trainer", "machine"])
def test_tensorboard_shows_each_step_once_after_a_kill(run_dir, known, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # tensorboardX would load it
    pytest.importorskip("tensorboardX")
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator

    send("tensorboard", run_dir, *range(1, 7))
    if known:  # more was sent than had been noted
        (run_dir / "trackers" / "tensorboard.json").write_text(json.dumps(known))
    send("tensorboard", run_dir, *range(5, 9), resumed_from=4)
    events = event_accumulator.EventAccumulator(str(run_dir)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 9))
    assert [event.step for event in events.Scalars("val/loss")] == [2, 4, 6, 8]
    events = plugin_event_accumulator.EventAccumulator(str(run_dir)).Reload()  # the server's
    assert [event.step for event in events.Tensors("samples/1")] == [2, 4, 6, 8]
    assert "node1" in events.Tensors("environment")[0].tensor_proto.string_val[0].decode()
    for path in run_dir.glob("events.*"):
        assert not any(secret in path.read_bytes() for secret in (b"pa55", b"01234567", b"hf_abc"))


def test_tensorboard_forgets_what_the_run_repeated_without_it(run_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    pytest.importorskip("tensorboardX")
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    send("tensorboard", run_dir, *range(1, 9))
    add(run_dir, *range(4, 12), resumed_from=3, loss=-1)
    send("tensorboard", run_dir, 12, resumed_from=11)
    add(run_dir, *range(13, 15))
    send("tensorboard", run_dir, 15, resumed_from=14)
    found = EventAccumulator(str(run_dir)).Reload().Scalars("train/loss")
    assert [event.step for event in found] == list(range(1, 16))
    assert [event.value < 0 for event in found] == [3 < event.step < 12 for event in found]
    [*_, last] = sorted(run_dir.glob("events.*"))
    [*_, start] = EventAccumulator(str(last)).Reload().Scalars("train/loss")[:1]
    assert start.step == 12  # not again from the branch that it knows by now


@pytest.mark.parametrize("how", ["cut", "removed", "replaced"])
def test_tail_reads_a_file_that_is_not_the_same_from_its_start(run_dir, how):
    path = run_dir / "metrics.jsonl"
    add(run_dir, 1, 3)
    tail = Tail(path, path.stat().st_size)
    add(run_dir, 5)
    assert [record["step"] for record in tail.read()] == [5]
    if how == "cut":
        path.write_bytes(path.read_bytes()[:30])  # the second line is damaged
    if how == "removed":
        path.unlink()
    if how == "replaced":
        path.rename(run_dir / "old")
        add(run_dir, *range(1, 7))  # more than was there
    records = tail.read()
    add(run_dir, 7)
    records += tail.read()
    add(run_dir, 9)
    steps = {record["step"] for record in records + tail.read()}
    assert steps == {"cut": {1, 9}, "removed": {7, 9}, "replaced": {*range(1, 8), 9}}[how]


def test_trackio_holds_each_step_once_after_a_kill(run_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    send("trackio", run_dir, *range(1, 7))
    send("trackio", run_dir, *range(5, 9), resumed_from=4)
    with sqlite3.connect(tmp_path / "trackio" / "p.db") as database:
        found = database.execute("select run_name, step, metrics from metrics order by id")
        rows = [(name, step, json.loads(metrics)) for name, step, metrics in found]
        [[config]] = database.execute("select config from configs")
    assert {name for name, _, _ in rows} == {"run-1"}
    assert [step for _, step, row in rows if "train/loss" in row] == list(range(1, 9))
    assert [step for _, step, row in rows if "val/loss" in row] == [2, 4, 6, 8]
    assert [step for _, step, row in rows if "samples" in row] == [2, 4, 6, 8]
    assert "node1" in str(config)
    assert not any(secret in f"{rows} {config}" for secret in ("pa55", "01234567", "hf_abc"))


def test_wandb_gets_each_step_once_after_a_kill(run_dir, monkeypatch):
    """Also the evaluation of an update that was sent before the kill."""
    rows, options = [], {}

    def init(**given):
        options.update(given)
        return SimpleNamespace(define_metric=lambda *_, **__: None, url="https://host/run-1")

    stub = SimpleNamespace(init=init, log=rows.append, finish=lambda: None, Table=dict)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    send("wandb", run_dir, 1, 2, 3)
    del rows[2:4]  # the evaluation and the samples of update 2 were not made yet
    (run_dir / "trackers" / "wandb.json").write_text('{"loss": 3}')
    send("wandb", run_dir, 3, 4, resumed_from=2)
    assert [row["update"] for row in rows if "train/loss" in row] == [1, 2, 3, 4]
    assert [row["update"] for row in rows if "val/loss" in row] == [2, 4]
    assert [row["update"] for row in rows if "samples" in row] == [2, 4]
    assert options["id"] == "run-1" and options["resume"] == "allow"
    assert options["config"]["environment"] == {"host": "node1"}
    assert not any(secret in f"{rows} {options}" for secret in ("pa55", "01234567", "hf_abc"))
