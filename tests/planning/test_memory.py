import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from inl_jax.config import InputError, MeshConfig
from inl_jax.config_file import load_config, override
from inl_jax.parallel import sharding
from inl_jax.parallel.sharding import make_mesh
from inl_jax.planning import memory
from inl_jax.training.state import make_layout
from inl_jax.training.step import check_offload

ROOT = Path(__file__).parents[2]
RECIPES = {
    "masters": {},
    "stochastic": {"rounding": "stochastic", "moment_dtype": "bfloat16"},
    "offload": {"state_memory": "pinned_host"},
    "adafactor": {"optimizer": "adafactor", "rounding": "stochastic"},
}


def bytes_of(tree, kind):
    return sum(
        math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
        for a in jax.tree.leaves(tree)
        if (a.sharding.memory_kind == "pinned_host") == (kind == "host")
    )


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 4, 2), (2, 2, 2)])
def test_the_state_part_of_the_memory_is_exact(train_config, recipe, mesh):
    data, fsdp, tensor = mesh
    for shards in ("all", "optimizer"):
        config = train_config(
            model={"param_dtype": "bfloat16", "num_kv_heads": 2},
            optim=RECIPES[recipe],
            mesh=MeshConfig(data=data, fsdp=fsdp, tensor=tensor, fsdp_shards=shards),
        )
        mesh_ = make_mesh(config.mesh)
        state, needed = make_layout(config, mesh_), memory.memory_needed(config, mesh_)
        parts = [needed.device[part] for part in ("parameters", "masters", "moments")]
        assert sum(parts) == bytes_of(state, "device") - 2 * 4  # two counters
        assert needed.host_bytes == bytes_of(state, "host")
        assert needed.device["parameters"] == bytes_of(state.params, "device")
        assert (needed.host_bytes > 0) == (recipe == "offload")
        masters = needed.device["masters"] + needed.host.get("masters", 0)
        assert (masters > 0) == (recipe in ("masters", "offload"))


def test_the_accumulator_is_counted_in_its_type(train_config):
    def accumulator(**optim):
        config = train_config(model={"param_dtype": "bfloat16"}, accumulate_steps=2, optim=optim)
        return memory.memory_needed(config, make_mesh(config.mesh)).device["accumulator"]

    assert accumulator() == 2 * accumulator(accumulator_dtype="bfloat16") > 0


def test_the_memory_estimate_falls_with_what_saves_memory(train_config):
    def total(**fields):
        model = {"num_layers": 8} | fields.pop("model", {})
        config = train_config(model=model, **fields)
        return memory.memory_needed(config, make_mesh(config.mesh)).device_bytes

    config = train_config(model={"num_layers": 8, "remat": "integrator"})
    mesh = make_mesh(config.mesh)
    by_remat = memory.activations_by_remat(config, mesh)
    assert list(by_remat) == ["none", "integrator", "all_but_integrator", "block"]
    kept = memory.memory_needed(config, mesh).device["activations (estimate)"]
    assert by_remat["block"] < by_remat["integrator"] == kept < by_remat["none"]
    assert total(model={"remat": "block"}) < total(model={"remat": "none"})
    for kind in ("integrator", "all_but_integrator"):
        assert total(model={"remat": "block"}) < total(model={"remat": kind})
        assert total(model={"remat": kind}) < total(model={"remat": "none"})
    for saves in ({"integrator_segment": 2}, {"integrator_chunk": 4}, {"num_iterations": 0}):
        assert total(model={"remat": "none"} | saves) < total(model={"remat": "none"})
    assert total() < total(model={"integrator_gradient": "autodiff"})
    assert total(loss_chunk=4) < total(loss_chunk=8) < total(loss_chunk=0)
    assert total(batch_size=4) < total(batch_size=8)
    assert total(batch_size=64, accumulate_steps=8) < total(batch_size=64)
    assert total(mesh=MeshConfig(data=8)) < total(mesh=MeshConfig(data=1))


@pytest.mark.parametrize("name", ["3b", "4b"])
def test_the_state_of_a_device_falls_as_one_over_n(name):
    """At full size: shapes only."""
    config = override(load_config(name), ["--accumulate_steps", "8"])

    def state(n):
        mesh = make_mesh(MeshConfig(data=1, fsdp=n))
        return bytes_of(make_layout(config, mesh), "device")

    whole = state(1)
    for n in (2, 4, 8):
        assert state(n) == pytest.approx(whole / n, rel=0.01)  # vectors are on every device


ESTIMATED = [
    ("small", 1, "4"),
    ("small", 8, "4"),
    ("medium", 1, "4"),
    ("medium", 8, "4"),
    ("large", 1, "16"),
    ("large", 8, "8"),
]


def estimate(*args, unoptimized="0"):
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": unoptimized,
        "JAX_PLATFORMS": "cuda",  # as where there is a GPU, which an estimate leaves alone
    }
    return subprocess.run(
        [sys.executable, ROOT / "scripts/estimate.py", *args],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data", "fsdp"])
@pytest.mark.parametrize(("name", "devices", "accumulate"), ESTIMATED)
def test_the_estimate_is_within_15_percent_of_the_compiled_step(name, devices, accumulate, mesh):
    if devices == 1 and mesh == "fsdp":
        pytest.skip("one device has one mesh")
    shape = ("--mesh.data", "1", "--mesh.fsdp", "rest") if mesh == "fsdp" else ()
    done = estimate(
        "--config",
        name,
        "--devices",
        str(devices),
        "--accumulate_steps",
        accumulate,
        "--compile",
        "cpu",
        "--json",
        *shape,
    )
    record = json.loads(done.stdout)
    assert record["estimated_bytes"] == pytest.approx(record["device_bytes"], rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [("8", "2", "0"), ("8", "1", "0"), ("2", "1", "5")],
)
def test_the_estimate_holds_for_the_scores_of_attention(flags):
    batch_size, accumulate, iterations = flags
    done = estimate(
        "--config",
        "small",
        "--model.context",
        "attention",
        "--model.num_iterations",
        iterations,
        "--model.max_seq_len",
        "4096",
        "--data.seq_len",
        "4096",
        "--model.num_layers",
        "2",
        "--batch_size",
        batch_size,
        "--accumulate_steps",
        accumulate,
        "--compile",
        "--json",
    )
    record = json.loads(done.stdout)
    assert record["estimated_bytes"] == pytest.approx(record["device_bytes"], rel=0.15)


def test_the_script_says_what_fits_and_the_change_that_makes_it_fit():
    done = estimate("--config", "3b", "--json")
    record = json.loads(done.stdout)
    assert done.returncode == 0 and record["fits"] and record["change"] is None
    assert record["device_bytes"] == sum(record["parts"].values()) and record["host_bytes"] == 0

    done = estimate("--config", "3b", "--device", "RTX4090", "--json")
    record = json.loads(done.stdout)
    assert done.returncode == 2 and not record["fits"]
    change = record["change"].split()
    done = estimate("--config", "3b", "--device", "rtx4090", "--json", *change)
    record = json.loads(done.stdout)
    assert done.returncode == 0 and record["fits"] and record["host_bytes"] > 0


def test_the_script_asks_the_compiler_that_is_always_there():
    done = estimate("--config", "tiny", "--devices", "2", "--compile", "--json", unoptimized="1")
    record = json.loads(done.stdout)
    assert record["compiler"] == "cpu" and record["sent_bytes"] >= record["least_bytes"] > 0
    assert record["device_bytes"] != record["estimated_bytes"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "tpu"], "--device tpu: choose one of b200-180gb, "),
        (["--device", "a100"], "--device a100: choose one of a100-80gb, a100-40gb"),
        (["--devices", "0"], "--devices 0: must be positive"),
        (["--devices", "3"], "batch_size=64: does not divide over 3"),
    ],
)
def test_a_mistake_is_one_line(flags, message):
    done = estimate("--config", "3b", *flags)
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_smallest_change_fits_and_holds_nothing_that_is_not_needed(train_config):
    config = train_config(
        model={"param_dtype": "bfloat16", "d_model": 64, "num_layers": 8}, batch_size=8
    )
    mesh = make_mesh(config.mesh)
    needed = memory.memory_needed(config, mesh).device_bytes
    found = []
    for share in (0.9, 0.55, 0.3):
        change = memory.smallest_change(config, mesh, share * needed)
        found.append(change)
        changed = override(config, change)
        assert memory.memory_needed(changed, mesh).device_bytes <= share * needed
        # None of its flags could be left out.
        for i in range(0, len(change), 2):
            fewer = override(config, change[:i] + change[i + 2 :])
            assert memory.memory_needed(fewer, mesh).device_bytes > share * needed
    assert found[0] == ["--accumulate_steps", "8"]
    assert len(found[2]) >= len(found[1])
    assert memory.smallest_change(config, mesh, 0) is None


def test_no_change_that_costs_memory_stands_in_the_way_of_others():
    """On a tensor axis, where each device has all rows of a micro-batch."""
    config = override(
        load_config("4b"),
        [
            "model.max_seq_len=16384",
            "data.seq_len=16384",
            "model.compute_dtype=bfloat16",
            "mesh.data=1",
            "mesh.tensor=2",
        ],
    )
    mesh = make_mesh(config.mesh)
    usable = memory.USABLE * memory.DEVICES["rtx4060ti-16gb"] * 2**20
    changed = override(config, memory.smallest_change(config, mesh, usable))
    assert memory.memory_needed(changed, mesh).device_bytes <= usable


def test_a_platform_without_host_memory_is_an_error(train_config, monkeypatch):
    config = train_config(optim={"state_memory": "pinned_host"})
    mesh = make_mesh(config.mesh)
    make_layout(config, mesh)
    with pytest.raises(RuntimeError, match="optim.state_memory=pinned_host.* keeps no state"):
        check_offload("HloModule m, entry_computation_layout={(f32[4]{0})->f32[4]{0}}")
    monkeypatch.setattr(sharding, "_memory_kinds", lambda mesh: {"device"})
    with pytest.raises(InputError, match="optim.state_memory=pinned_host: .* has only device mem"):
        make_layout(config, mesh)
