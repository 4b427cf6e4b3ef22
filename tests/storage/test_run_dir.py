import dataclasses
import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
from hub import COMMITS, Hub

from inl_jax.config import InputError, with_fields
from inl_jax.failures import DiskFull, MachineFailure
from inl_jax.storage.identity import Identity
from inl_jax.storage.run_dir import (
    Lock,
    check_run,
    has_begun,
    locked,
    pinned,
    read_config,
    read_tokenizer,
    record_run,
)
from inl_jax.tokens.tokenizer import load_tokenizer, train_bpe

CONFIG = {"model": {"param_dtype": "bfloat16", "num_layers": 1}, "accumulate_steps": 2}


@pytest.fixture
def config(train_config):
    return train_config(**CONFIG)


def contents(folder):
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*"))


def start_run(config, tokenizer):
    check_run(config, tokenizer)
    record_run(config, tokenizer)


BYTES = load_tokenizer("bytes")


@pytest.mark.parametrize(
    "change, named",
    [
        ({"d_ff": 64}, "model.d_ff=64,.* has model.d_ff=32"),
        ({"kappa": 2.0}, "model.kappa=2.0,.* has model.kappa=1.0"),
        ({"param_dtype": "float32"}, "model.param_dtype=float32,.* has model.param_dtype=bfloat16"),
    ],
)
def test_check_run_refuses_another_model(config, change, named):
    start_run(config, BYTES)
    before = contents(config.run_dir)
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, **change))
    with pytest.raises(InputError, match=named):
        start_run(other, BYTES)
    assert contents(config.run_dir) == before
    assert read_config(config.run_dir) == config


def test_check_run_refuses_another_kind_of_optimizer_state(config):
    start_run(config, BYTES)
    adafactor = dataclasses.replace(config.optim, optimizer="adafactor")
    start_run(dataclasses.replace(config, optim=adafactor), BYTES)  # nothing was saved yet
    start_run(config, BYTES)
    (Path(config.run_dir) / "checkpoints" / "3").mkdir(parents=True)
    for change in ({"optimizer": "adafactor"}, {"moment_dtype": "bfloat16"}):
        (field, value), *_ = change.items()
        other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, **change))
        with pytest.raises(InputError, match=f"optim.{field}={value}, .*another run_dir with init"):
            start_run(other, BYTES)


def test_check_run_refuses_another_tokenizer(config):
    start_run(config, BYTES)
    with pytest.raises(InputError, match=r"data.tokenizer=bpe:260 .* has bytes \(257 ids"):
        start_run(config, train_bpe(["some text, some text"] * 9, 260))


def test_check_run_allows_another_recipe_and_says_so(config, said):
    start_run(config, BYTES)
    other = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, remat="block", attention_kernel="xla"),
        optim=dataclasses.replace(config.optim, learning_rate=1e-4),
        num_steps=20,
    )
    start_run(other, BYTES)
    changed = " ".join(said)
    for part in (
        "model.remat none -> block",
        "model.attention_kernel auto -> xla",
        "optim.learning_rate 0.01 -> 0.0001",
        "8 -> 20",
    ):
        assert part in changed
    assert len(said) == 4 and read_config(config.run_dir) == other
    start_run(other, BYTES)
    assert len(said) == 4


def test_read_config_names_what_is_no_run_directory(tmp_path):
    with pytest.raises(InputError, match="no config.json"):
        read_config(tmp_path)


def test_read_config_says_how_an_exported_model_becomes_a_run(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "inl"}')
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(InputError, match=f"inl import --weights {tmp_path} --out NEW"):
        read_config(tmp_path)


def test_locked_keeps_a_second_trainer_out(tmp_path):
    with locked(tmp_path), pytest.raises(InputError, match="another process trains there"):
        with locked(tmp_path):
            pass
    with locked(tmp_path):  # and lets it in when the first has gone
        pass


def test_locked_warns_on_a_file_system_without_locks(tmp_path, monkeypatch, said):
    """ENOSYS of some network file systems does not mean that somebody holds the lock."""

    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with locked(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    (line,) = said
    assert line.startswith("WARNING") and "no locks (Function not implemented)" in line


def test_locked_keeps_a_second_trainer_out_after_the_lock_was_removed(tmp_path):
    with locked(tmp_path) as lock:
        os.unlink(tmp_path / "lock")
        with pytest.raises(InputError, match="another process trains there"), locked(tmp_path):
            pass
        lock.renew()  # made and locked again
        with open(tmp_path / "lock") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("make", [os.mkfifo, lambda lock: lock.symlink_to("/nowhere/at/all")])
def test_locked_names_a_lock_that_is_no_file(tmp_path, make):
    make(tmp_path / "lock")
    with pytest.raises(InputError, match=f"^run_dir={tmp_path}/lock: .*; remove that file"):
        Lock(tmp_path)
    (tmp_path / "lock").unlink()
    Lock(tmp_path).release()


def test_renew_takes_a_removed_directory_and_refuses_another(tmp_path):
    run_dir = tmp_path / "run"
    with locked(run_dir) as lock:
        shutil.rmtree(run_dir)
        lock.renew()
        with pytest.raises(InputError, match="another process trains there"), locked(run_dir):
            pass
        os.replace(run_dir, tmp_path / "elsewhere")
        run_dir.mkdir()
        with pytest.raises(MachineFailure, match=f"{run_dir} was replaced"):
            lock.renew()


def test_renew_refuses_the_lock_of_another_trainer_where_directories_have_none(
    tmp_path, monkeypatch
):
    flock = fcntl.flock

    def of_files_only(handle, how):
        if not os.path.isfile(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", of_files_only)
    with locked(tmp_path) as lock:
        os.unlink(tmp_path / "lock")
        with locked(tmp_path), pytest.raises(MachineFailure, match="lock was replaced"):
            lock.renew()


@pytest.fixture
def saved(config):
    """A run whose checkpoint 3 holds its identity; returns that checkpoint."""
    start_run(config, BYTES)
    step_dir = Path(config.run_dir) / "checkpoints/3"
    step_dir.mkdir(parents=True)
    Identity(config, BYTES).write(step_dir)
    return step_dir


def with_model(config, **fields):
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))


@pytest.mark.parametrize("text", [None, "", "{", "[" * 100_000, '{"model": {"dt": []}}', "\0"])
def test_lost_config_is_taken_from_the_newest_checkpoint(config, saved, said, text):
    path = Path(config.run_dir) / "config.json"
    path.unlink() if text is None else path.write_text(text)
    assert read_config(config.run_dir) == config
    assert said == [f"{path} is missing or damaged: taken from {saved}/config.json"]
    with pytest.raises(InputError, match="model.dt=0.2, .* has model.dt=0.1"):
        check_run(with_model(config, dt=0.2), BYTES)
    start_run(config, BYTES)
    assert json.loads(path.read_text()) == json.loads((saved / "config.json").read_text())


def test_lost_config_without_a_copy_is_refused(config, saved):
    shutil.rmtree(saved)
    saved.mkdir()
    os.unlink(f"{config.run_dir}/config.json")
    with pytest.raises(InputError, match="config.json is gone, and the checkpoints there do not"):
        check_run(config, BYTES)


def test_config_of_another_run_is_refused_until_the_advice_is_followed(config, saved):
    other = with_model(config, dt=0.2)
    record_run(other, BYTES)
    for read in (lambda: read_config(config.run_dir), lambda: check_run(other, BYTES)):
        with pytest.raises(InputError, match="has model.dt=0.2, but .* model.dt=0.1: copy"):
            read()
    shutil.copy(saved / "config.json", config.run_dir)
    check_run(config, BYTES)


@pytest.mark.parametrize("text", [None, "", "{}", "\0"])
def test_lost_tokenizer_is_taken_from_the_newest_checkpoint(config, saved, said, text):
    path = Path(config.run_dir) / "tokenizer.json"
    path.unlink() if text is None else path.write_text(text)
    assert read_tokenizer(config.run_dir).fingerprint == BYTES.fingerprint
    assert "is missing or damaged: taken from" in said[0]
    start_run(config, BYTES)
    assert path.read_text() == (saved / "tokenizer.json").read_text()


def test_tokenizer_of_another_run_is_refused_until_the_advice_is_followed(config, saved):
    train_bpe(["some text, some text"] * 9, 260).save(Path(config.run_dir))
    with pytest.raises(InputError, match=r"is bpe:260 .* trained with bytes \(257 ids.*: copy"):
        read_tokenizer(config.run_dir)
    shutil.copy(saved / "tokenizer.json", config.run_dir)
    assert read_tokenizer(config.run_dir).fingerprint == BYTES.fingerprint


@pytest.mark.parametrize("lost", ["checkpoints", "checkpoints/3"])
def test_check_run_refuses_a_run_that_lost_its_checkpoints(config, saved, said, lost):
    run_dir = Path(config.run_dir)
    (run_dir / "last_save.json").write_text('{"step": 3}')
    (run_dir / "metrics.jsonl").write_text('{"step": 5, "loss": 3.0}\n')
    check_run(config, BYTES)
    shutil.rmtree(run_dir / lost)
    with pytest.raises(InputError, match="at update 5, but checkpoints/ is gone or empty"):
        check_run(config, BYTES)
    (run_dir / "metrics.jsonl").unlink()  # as the message advises
    check_run(config, BYTES)
    assert said == [f"the checkpoints and the log of the run in {run_dir} are gone: it starts at 0"]


def test_check_run_lets_a_run_start_again_that_ended_before_its_first_save(config, saved, said):
    run_dir = Path(config.run_dir)
    shutil.rmtree(saved)
    (run_dir / "metrics.jsonl").write_text('{"step": 5, "loss": 3.0}\n')
    check_run(config, BYTES)
    assert said == [
        f"nothing was saved before the run in {run_dir} ended at update 5: it starts at 0"
    ]


def test_full_disk_at_the_start_is_one_line(config, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", full)
        with pytest.raises(DiskFull, match="No space left"), locked(config.run_dir):
            pass
    monkeypatch.setattr("inl_jax.storage.run_dir.write_text", full)
    with pytest.raises(DiskFull, match=f"{config.run_dir}: No space left"):
        record_run(config, BYTES)


def test_pinned_keeps_the_commits_that_the_run_began_with(
    train_config, monkeypatch, tmp_path, said
):
    hub = Hub(monkeypatch, tmp_path)
    first, second = COMMITS["main"], COMMITS["v2"]
    paths = ("stdlib", "hf:owner/name@en")
    asked = train_config(data={"paths": paths, "tokenizer": "owner/tokens"})
    run = pinned(asked)
    assert run.data.paths == ("stdlib", f"hf:owner/name@en#{first}")
    assert run.data.tokenizer == f"owner/tokens#{first}"
    record_run(run, BYTES)
    hub.commits[None], hub.online = second, False
    said.clear()
    assert pinned(asked) == run  # the same command, though the hub has moved
    check_run(pinned(asked), BYTES)
    assert not any("changed since" in line for line in said)
    assert f"hf:owner/name@en#{first}, as the run has recorded; name another commit" in said[1]
    other = f"hf:owner/name@en#{second}"
    assert pinned(with_fields(asked, {"data.paths": ("stdlib", other)})).data.paths[1] == other


def test_run_has_begun_even_if_its_config_is_lost(tmp_path):
    assert not has_begun(tmp_path)
    (tmp_path / "checkpoints" / "tmp").mkdir(parents=True)
    assert not has_begun(tmp_path)
    (tmp_path / "checkpoints" / "3").mkdir()
    assert has_begun(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").symlink_to("nowhere")
    assert has_begun(tmp_path / "other")
