import dataclasses
from pathlib import Path

import jax
import pytest
from conftest import mesh_of
from mixer_cases import FIELDS, PATTERN

from inl_jax import train
from inl_jax.config import InputError, MeshConfig, with_fields
from inl_jax.data.corpus import prepare
from inl_jax.failures import DiskFull
from inl_jax.model.platform.device import H100, made_for
from inl_jax.parallel.sharding import fit_to_mesh, make_mesh
from inl_jax.planning import preflight
from inl_jax.tokens.tokenizer import load_tokenizer
from inl_jax.training.state import make_layout


def check_machine(config):
    """The check as `train` calls it."""
    mesh = make_mesh(config.mesh)
    fitted = fit_to_mesh(config, mesh)
    preflight.check_machine(config, fitted, mesh, make_layout(fitted, mesh))


def test_count_steps_counts_epochs_in_windows(train_config):
    config = train_config(num_steps=0, num_epochs=0.5, optim={"warmup_steps": 0})
    corpus = prepare(config.data)
    windows = (corpus.sources[0].train_tokens - 1) // 32
    assert preflight.count_steps(config, corpus) == windows // 2 // 8
    with pytest.raises(InputError, match="optim.warmup_steps=9999"):
        preflight.count_steps(with_fields(config, {"optim.warmup_steps": 9999}), corpus)


def test_count_steps_refuses_more_updates_than_the_counters_hold(train_config):
    config = train_config(num_steps=0, num_epochs=1e8)
    with pytest.raises(InputError, match="num_epochs=.*: a run has 2,147,483,647 updates"):
        preflight.count_steps(config, prepare(config.data))


def test_nearest_directory_names_a_path_that_is_too_long(tmp_path):
    assert preflight.nearest_directory(f"{tmp_path}/a/b") == tmp_path
    with pytest.raises(InputError, match="run_dir=.*: File name too long; name a directory"):
        preflight.nearest_directory(str(tmp_path / ("x" * 300)))


def test_prepare_data_refuses_a_source_without_a_whole_window(train_config, tmp_path):
    (tmp_path / "short.txt").write_text("short\n")
    with pytest.raises(InputError, match="fewer than one window"):
        preflight.prepare_data(train_config(data={"paths": (str(tmp_path / "short.txt"),)}))


def test_train_checks_memory_before_it_allocates(train_config, monkeypatch):
    monkeypatch.setattr(preflight, "prepare", lambda *_: pytest.fail("went on"))
    config = train_config(model={"d_model": 2**17, "d_ff": 2**17})
    with pytest.raises(InputError, match=r"needs .* GiB of memory on each device and .* GiB was"):
        train(config)


def test_train_checks_the_attention_kernel_before_it_allocates(train_config, monkeypatch):
    monkeypatch.setattr(preflight, "prepare", lambda *_: pytest.fail("went on"))
    cudnn = {"context": "attention", "attention_kernel": "cudnn"}
    with pytest.raises(InputError, match="model.attention_kernel=cudnn: JAX runs on cpu"):
        train(train_config(model=cudnn))
    narrow, wide = (
        train_config(model={"context": "attention", "compute_dtype": dtype})
        for dtype in ("bfloat16", "float32")
    )
    with made_for(H100):
        with pytest.raises(InputError, match="model.compute_dtype=float32"):
            train(wide)
        assert "attention context (cudnn kernel)" in preflight.describe_model(narrow)
        alternating = with_fields(narrow, {"model.context": "gated", "model.attention_every": 2})
        said = "gated context, attention in every 2nd layer (cudnn kernel)"
        assert said in preflight.describe_model(alternating)


def test_train_refuses_kernels_on_a_mesh_that_shards_their_width(train_config):
    fields = {"integrator_kernel": "mosaic", "controller_width": 64, "d_model": 64}
    with made_for(H100):
        check_machine(train_config(model=fields, mesh=MeshConfig(data=1, fsdp=2)))
        with pytest.raises(InputError, match="integrator_kernel=mosaic .* mesh.tensor 1"):
            check_machine(train_config(model=fields, mesh=MeshConfig(data=1, tensor=2)))


def test_check_samples_refuses_what_the_cache_of_attention_cannot_hold(train_config):
    def check(mixer):
        config = train_config(model=FIELDS[mixer], sample_every=4, sample_tokens=31)
        preflight.check_samples(config, load_tokenizer("bytes"))

    check("decay")
    check("gated")
    for mixer in ("attention", PATTERN):
        with pytest.raises(InputError, match="sample_tokens=31.*34 tokens.*max_seq_len=32"):
            check(mixer)


def test_train_checks_the_disk_before_it_allocates(train_config, monkeypatch):
    monkeypatch.setattr(preflight, "prepare", lambda *_: pytest.fail("went on"))
    usage = preflight.shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DiskFull, match="run_dir"):
        train(train_config())


def test_check_machine_announces_fewer_micro_batches(train_config, said):
    check_machine(train_config(accumulate_steps=8, mesh=MeshConfig(data=4)))
    assert "accumulate_steps 8 -> 2, so that each of 4 devices has rows of" in " ".join(said)
    assert "memory of each device: needs " in " ".join(said)
    assert " 0.00 GiB" not in " ".join(said)
    said.clear()
    check_machine(train_config())
    assert not any("accumulate_steps" in line for line in said)
    assert any(line.startswith("memory of each device: needs ") for line in said)


def test_check_machine_wants_room_for_all_checkpoints_that_exist_at_a_time(
    train_config, monkeypatch
):
    """Those kept, the best and the one being written, less those on disk already."""
    config = train_config(save_every=2, num_steps=100, keep_last=3)
    layout = make_layout(config, mesh_of())
    one = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layout.state))

    def check(free, **fields):
        usage = preflight.shutil.disk_usage("/")._replace(free=free)
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage)
        check_machine(dataclasses.replace(config, **fields))

    check(5 * one)
    with pytest.raises(DiskFull, match="room for 5 checkpoints .*keep_last=3; .*lower keep_last"):
        check(5 * one - 1)
    check(3 * one, keep_last=1)
    check(one, save_every=0, eval_every=0)  # the last alone
    with pytest.raises(DiskFull, match="room for 1 checkpoint of"):
        check(one - 1, save_every=0, eval_every=0)
    check(2 * one, save_every=60, eval_every=0)
    check(one, save_every=100, eval_every=0)
    with pytest.raises(DiskFull, match="room for 2 checkpoints of"):
        check(one, save_every=0, eval_every=60)  # which may be the best
    check(2 * one, num_steps=0, num_epochs=1)  # the number of updates is not known yet
    check(4 * one, eval_every=0)  # no best
    folder = Path(config.run_dir) / "checkpoints" / "2"
    folder.mkdir(parents=True)
    (folder / "file").write_bytes(bytes(one))
    check(4 * one)


def test_check_machine_wants_room_on_the_host_for_state_kept_there(train_config, monkeypatch, said):
    config = train_config(optim={"state_memory": "pinned_host"})
    mesh = make_mesh(config.mesh)
    needed = preflight.memory_needed(config, mesh, make_layout(config, mesh))
    device, host = needed.device_bytes, needed.host_bytes
    check_machine(config)
    assert any("memory of this host: needs" in line for line in said)
    monkeypatch.setattr(preflight, "host_memory", lambda: host - 1)
    with pytest.raises(InputError, match="optim.state_memory=pinned_host: takes .* is free"):
        check_machine(config)
    # A CPU device has no memory beside the host's.
    monkeypatch.setattr(preflight, "host_memory", lambda: 10 * host)
    monkeypatch.setattr(preflight, "memory_found", lambda _: (device + host - 1, "free"))
    with pytest.raises(InputError, match="of memory on each device and .* was found") as error:
        check_machine(config)
    assert "add --" in str(error.value) and "pinned_host" not in str(error.value)
