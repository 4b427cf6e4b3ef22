import json

import pytest

import inl_jax
from inl_jax import guide
from inl_jax.config import InputError
from inl_jax.config_file import override


def test_train_inl_llm_trains_as_the_guide_says(text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    small = override(
        inl_jax.load_config("tiny"),
        [
            "model.d_model=16",
            "model.d_ff=32",
            "model.num_layers=1",
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
    assert history[-1]["validation_loss"] > 0
    assert tokenizer.decode(tokenizer.encode("abc")) == "abc"
    assert isinstance(model.generate("the", max_new_tokens=3), str)
    assert json.loads((tmp_path / "guide" / "config.json").read_text())["batch_size"] == 8
    with pytest.raises(InputError, match="device=cuda"):
        inl_jax.train_inl_llm(str(text_file), device="cuda")
