import dataclasses
import errno
import fcntl
from pathlib import Path

import pytest
from hub import COMMITS, Hub

from inl_jax.config import InputError, with_fields
from inl_jax.storage.run_dir import check_run, locked, pinned, read_config, record_run
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
