import dataclasses
from pathlib import Path

import jax
import pytest

from inl_jax import train
from inl_jax.config import InputError, MeshConfig
from inl_jax.config_file import override
from inl_jax.data.corpus import prepare
from inl_jax.model import language_model as model
from inl_jax.parallel.sharding import make_mesh
from inl_jax.planning import preflight
from inl_jax.training.state import make_layout


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
    cudnn = {"context": "attention", "attention_kernel": "cudnn"}
    with pytest.raises(InputError, match="model.attention_kernel=cudnn: JAX runs on cpu"):
        train(train_config(model=cudnn))
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


def test_fewer_micro_batches_are_announced(train_config):
    config = train_config(accumulate_steps=8, mesh=MeshConfig(data=4))
    mesh = make_mesh(config.mesh)
    lines = []
    preflight.check_machine(config, mesh, make_layout(config, mesh), report=lines.append)
    assert "accumulate_steps 8 -> 2, so that each of 4 devices has rows of" in " ".join(lines)


def test_there_must_be_room_for_all_checkpoints_that_exist_at_a_time(train_config, monkeypatch):
    """Those kept, the best and the one being written, less what is there already."""
    config = train_config(save_every=2, num_steps=100, keep_last=3)
    mesh = make_mesh(config.mesh)
    abstract = make_layout(config, mesh)
    one = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))

    def check(free, **fields):
        usage = preflight.shutil.disk_usage("/")._replace(free=free)
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage)
        preflight.check_machine(dataclasses.replace(config, **fields), mesh, abstract)

    check(5 * one)
    with pytest.raises(InputError, match="5 exist at a time .keep_last=3; .*lower keep_last"):
        check(5 * one - 1)
    check(3 * one, keep_last=1)
    check(one, save_every=0)  # the last alone
    check(2 * one, save_every=60)
    check(one, save_every=100)
    check(2 * one, num_steps=0, num_epochs=1)  # how many updates that makes is not known yet
    check(4 * one, eval_every=0)  # no best
    folder = Path(config.run_dir) / "checkpoints" / "2"
    folder.mkdir(parents=True)
    (folder / "file").write_bytes(bytes(one))
    check(4 * one)


def test_state_on_the_host_must_fit_there(train_config, monkeypatch):
    config = train_config(optim={"state_memory": "pinned_host"})
    mesh = make_mesh(config.mesh)
    abstract = make_layout(config, mesh)
    host = preflight.memory_needed(config, mesh).host_bytes
    lines = []
    preflight.check_machine(config, mesh, abstract, report=lines.append)
    assert any("memory of this host: needs" in line for line in lines)
    monkeypatch.setattr(preflight, "host_memory", lambda: host - 1)
    with pytest.raises(InputError, match="optim.state_memory=pinned_host: takes .* is free"):
        preflight.check_machine(config, mesh, abstract)
    # On a CPU it is the memory of the device, too.
    device = preflight.memory_needed(config, mesh).device_bytes
    monkeypatch.setattr(preflight, "host_memory", lambda: 10 * host)
    monkeypatch.setattr(preflight, "memory_found", lambda _: (device + host - 1, "free"))
    with pytest.raises(InputError, match="of memory on each device and .* was found") as error:
        preflight.check_machine(config, mesh, abstract)
    assert "add --" in str(error.value) and "pinned_host" not in str(error.value)
