import pytest

from inl_jax import model, preflight, train
from inl_jax.config import InputError, override
from inl_jax.corpus import prepare


def test_epochs_are_counted_in_windows(train_config):
    config = train_config(num_steps=0, num_epochs=0.5, optim={"warmup_steps": 0})
    corpus = prepare(config.data)
    windows = (corpus.sources[0].train_tokens - 1) // 32
    assert preflight.count_steps(config, corpus) == windows // 2 // 8
    with pytest.raises(InputError, match="optim.warmup_steps=9999"):
        preflight.count_steps(override(config, ["--optim.warmup_steps", "9999"]), corpus)


def test_memory_is_checked_before_anything_is_allocated(train_config, monkeypatch):
    monkeypatch.setattr(preflight, "prepare", lambda *_: pytest.fail("went on"))
    config = train_config(model={"d_model": 2**17, "d_ff": 2**17})
    with pytest.raises(InputError, match=r"needs .* GiB of memory on each device and .* GiB was"):
        train(config)


def test_the_attention_kernel_is_checked_before_anything_is_allocated(train_config, monkeypatch):
    monkeypatch.setattr(preflight, "prepare", lambda *_: pytest.fail("went on"))
    monkeypatch.setattr(model, "cuda_capability", lambda: (9, 0))
    with pytest.raises(InputError, match="model.compute_dtype=float32"):
        train(train_config(model={"context": "attention"}))
    config = train_config(model={"context": "attention", "compute_dtype": "bfloat16"})
    assert "attention context (cudnn kernel)" in preflight.describe_model(config)


def test_samples_too_long_for_the_model_are_refused_at_the_start(train_config):
    with pytest.raises(InputError, match="sample_tokens=31.*34 tokens.*max_seq_len=32"):
        train(train_config(sample_every=4, sample_tokens=31))


def test_disk_is_checked_before_anything_is_allocated(train_config, monkeypatch):
    monkeypatch.setattr(preflight, "prepare", lambda *_: pytest.fail("went on"))
    usage = preflight.shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match="run_dir"):
        train(train_config())
