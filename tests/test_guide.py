import dataclasses
import json
import types
from pathlib import Path

import numpy as np
import pytest

import inl_jax
from inl_jax import guide
from inl_jax.config import InputError
from inl_jax.config_file import override
from inl_jax.training.metrics import latest


def test_train_inl_llm_trains_as_the_guide_says(text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    small = override(
        inl_jax.load_config("tiny"),
        [
            "model.d_model=16",
            "model.d_ff=32",
            "model.num_layers=1",
            "model.num_iterations=1",
            "data.seq_len=16",
            "data.tokenizer=bytes",
            "model.num_heads=1",
            "model.num_kv_heads=1",
            "mesh.data=1",
        ],
    )
    monkeypatch.setattr(guide, "load_config", lambda name: {"tiny": small}[name])
    model, tokenizer, history = inl_jax.train_inl_llm(
        data_path=str(text_file),
        model_size="tiny",
        num_epochs=0.1,
        batch_size=8,
        learning_rate=1e-2,
        max_samples=1,
        save_dir=str(tmp_path / "guide"),
        device="cpu",
    )
    assert latest(history, "validation_loss") > 0
    assert tokenizer.decode(tokenizer.encode("abc")) == "abc"
    assert isinstance(model.generate("the", max_new_tokens=3), str)
    assert json.loads((tmp_path / "guide" / "config.json").read_text())["batch_size"] == 8
    with pytest.raises(InputError, match="device=cuda"):
        inl_jax.train_inl_llm(str(text_file), device="cuda")


@pytest.fixture
def configs(monkeypatch, tmp_path):
    """The configs of the runs that `train_inl_llm` starts; Ctrl-C ends each of them."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    started, ended = [], types.SimpleNamespace(interrupted=True, step=1)
    monkeypatch.setattr(guide, "train", lambda config: started.append(config) or ended)
    return started


def call(*arguments, **named):
    with pytest.raises(KeyboardInterrupt):
        inl_jax.train_inl_llm(*arguments, **{"model_size": "tiny"} | named)


def test_paths_and_numpy_numbers_are_taken_as_plain_ones(configs, text_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text())
    numbers = {
        "num_epochs": np.int64(2),
        "batch_size": np.int32(4),
        "learning_rate": np.float32(2**-10),
        "max_samples": np.int64(5),
    }
    call([text_file, str(other)], **numbers, save_dir=Path("runs/x"))
    plain = {name: number.item() for name, number in numbers.items()}
    call([str(text_file), str(other)], **plain, save_dir="runs/x")
    assert configs[0] == configs[1] and json.dumps(dataclasses.asdict(configs[0]))
    assert configs[0].data.paths == (str(text_file), str(other))
    assert (configs[0].run_dir, configs[0].data.max_documents) == ("runs/x", 5)


def test_stopped_run_ends_a_sweep(configs, text_file):
    with pytest.raises(KeyboardInterrupt, match="stopped at update 1; the same call resumes"):
        for rate in (1e-3, 1e-4):
            inl_jax.train_inl_llm(text_file, "tiny", learning_rate=rate)
    assert [config.optim.learning_rate for config in configs] == [1e-3]


def test_max_samples_says_that_it_does_nothing_for_a_text_file(configs, text_file, tmp_path, said):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {i} " * 200}) + "\n" for i in range(9)))
    call([text_file, rows], max_samples=3)
    call(text_file)
    (found,) = [line for line in said if "max_samples" in line]
    assert found.startswith(f"max_samples=3 does nothing for {text_file}: ")
    assert configs[0].data.max_documents == 3
