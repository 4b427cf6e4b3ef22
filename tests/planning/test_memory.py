import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from conftest import mesh_of
from mixer_cases import FIELDS, PATTERN

from inl_jax.config import InputError, MeshConfig, with_fields
from inl_jax.config_file import load_config
from inl_jax.model.platform.device import H100, made_for
from inl_jax.parallel.sharding import fit_to_mesh, make_mesh
from inl_jax.planning import memory
from inl_jax.planning.recipe import choose
from inl_jax.training.state import make_layout
from inl_jax.training.step import check_offload

ROOT = Path(__file__).parents[2]
RECIPES = {
    "masters": {},
    "stochastic": {"rounding": "stochastic", "moment_dtype": "bfloat16"},
    "offload": {"state_memory": "pinned_host"},
    "adafactor": {"optimizer": "adafactor", "rounding": "stochastic"},
}


def needed_by(config, devices=None):
    """Memory of a run on its own mesh, fitted, with the recipe that needs the least."""
    mesh = make_mesh(config.mesh, devices=devices)
    layout = make_layout(config, mesh)
    config = choose(fit_to_mesh(config, mesh), mesh, layout, 0)
    return memory.memory_needed(config, mesh, layout)


def bytes_of(tree, kind):
    return sum(
        math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
        for a in jax.tree.leaves(tree)
        if (a.sharding.memory_kind == "pinned_host") == (kind == "host")
    )


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("shape", "mixer"), [((1, 1, 1), "decay"), ((1, 4, 2), PATTERN), ((2, 2, 2), "gated")]
)
def test_memory_needed_counts_the_state_exactly(train_config, recipe, shape, mixer):
    data, fsdp, tensor = shape
    for shards in ("all", "optimizer"):
        config = train_config(
            model=FIELDS[mixer] | {"param_dtype": "bfloat16", "num_kv_heads": 2},
            optim=RECIPES[recipe],
            mesh=MeshConfig(data=data, fsdp=fsdp, tensor=tensor, fsdp_shards=shards),
        )
        mesh = make_mesh(config.mesh)
        layout = make_layout(config, mesh)
        needed = memory.memory_needed(config, mesh, layout)
        parts = [needed.device[part] for part in ("parameters", "masters", "moments")]
        assert sum(parts) == bytes_of(layout.state, "device") - 2 * 4  # two counters
        assert needed.host_bytes == bytes_of(layout.state, "host")
        assert needed.device["parameters"] == bytes_of(layout.state.params, "device")
        assert needed.device["gradients"] == bytes_of(layout.gradients, "device")
        assert (needed.host_bytes > 0) == (recipe == "offload")
        masters = needed.device["masters"] + needed.host.get("masters", 0)
        assert (masters > 0) == (recipe in ("masters", "offload"))


@pytest.mark.parametrize("gradient, fewer", [("lean", True), ("autodiff", False)])
def test_memory_needed_is_less_where_a_block_keeps_products_alone(train_config, gradient, fewer):
    """On a CPU, but not with autodiff, as the model decides (`kept_names`)."""
    model = {"remat": "none", "integrator_gradient": gradient, "compute_dtype": "float32"}
    config, mesh = train_config(model=model, loss_chunk=64), mesh_of()
    layout = make_layout(config, mesh)
    here = memory.memory_needed(config, mesh, layout).device_bytes
    with made_for(H100):
        there = memory.memory_needed(config, mesh, layout).device_bytes
    assert here < there if fewer else here == there


def test_memory_needed_counts_all_blocks_of_a_group_where_xla_holds_them_together(train_config):
    def activations(attention_every):
        model = {"context": "gated", "attention_every": attention_every, "num_layers": 4}
        return needed_by(train_config(model=model)).device["activations (estimate)"]

    assert activations(4) > activations(2) > activations(0)
    with made_for(H100):
        assert activations(4) == activations(2) == activations(0)


def test_memory_needed_counts_the_accumulator_in_its_type(train_config):
    def needed(accumulate_steps=2, **optim):
        model = {"param_dtype": "bfloat16"}
        config = train_config(model=model, accumulate_steps=accumulate_steps, optim=optim)
        return needed_by(config).device

    wide, narrow, none = needed(), needed(accumulator_dtype="bfloat16"), needed(accumulate_steps=1)
    assert wide["accumulator"] == 2 * narrow["accumulator"] > 0 == none["accumulator"]
    assert wide["gradients"] == narrow["gradients"] == none["gradients"] == narrow["accumulator"]


def test_memory_needed_falls_with_what_saves_memory(train_config):
    def total(**fields):
        model = {"num_layers": 8} | fields.pop("model", {})
        return needed_by(train_config(model=model, **fields)).device_bytes

    config = train_config(model={"num_layers": 8, "remat": "integrator"})
    by_remat = memory.activations_by_remat(config, make_mesh(config.mesh))
    assert list(by_remat) == ["none", "integrator", "all_but_integrator", "block"]
    kept = needed_by(config).device["activations (estimate)"]
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
def test_memory_needed_of_the_state_falls_as_one_over_n(name):
    """At full size: shapes only."""
    config = with_fields(load_config(name), {"accumulate_steps": 8})

    def state(n):
        return bytes_of(make_layout(config, mesh_of(fsdp=n)).state, "device")

    whole = state(1)
    for n in (2, 4, 8):
        assert state(n) == pytest.approx(whole / n, rel=0.01)  # vectors are on every device


GATED = ("--model.context", "gated")
MIXED = (*GATED, "--model.attention_every", "3")
ESTIMATED = [
    ("small", 1, "4", ()),
    ("small", 1, "4", GATED),
    ("small", 1, "4", MIXED),
    ("small", 8, "4", ()),
    ("small", 8, "4", MIXED),
    ("medium", 1, "4", ()),
    ("medium", 8, "4", ()),
    ("large", 1, "16", ()),
    ("large", 8, "8", ()),
]


def estimate(*args, unoptimized="0", platforms="cuda"):
    """By default as on a machine with a GPU, which an estimate must not touch."""
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": unoptimized,
        "JAX_PLATFORMS": platforms,
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
@pytest.mark.parametrize(("name", "devices", "accumulate", "mixers"), ESTIMATED)
def test_estimate_is_within_15_percent_of_the_compiled_step(
    name, devices, accumulate, mixers, mesh
):
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
        "--model.remat",
        "block",
        "--compile",
        "cpu",
        "--json",
        *mixers,
        *shape,
    )
    record = json.loads(done.stdout)
    assert record["estimated_bytes"] == pytest.approx(record["device_bytes"], rel=0.15)


REMATS = ["none", "integrator", "all_but_integrator", "block"]
FOR_GPUS = [(remat, sequences, ()) for remat in REMATS for sequences in (1, 4)]
FOR_GPUS += [(remat, 4, mixers) for remat in ("none", "block") for mixers in (GATED, MIXED)]


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "sequences", "mixers"), FOR_GPUS)
def test_estimate_is_within_10_percent_of_the_program_for_gpus(remat, sequences, mixers):
    """The choice of a recipe rests on this."""
    steps, layers = 8 // sequences, 6 if mixers == MIXED else 4
    flags = f"--config xlarge --model.num_layers {layers} --batch_size 8 --accumulate_steps {steps}"
    more = ("--model.remat", remat, "--compile", "cuda", "--json", *mixers)
    done = estimate(*flags.split(), *more, platforms="")  # the compiler needs no GPU
    if "XLA's CUDA compiler cannot be used" in done.stderr:
        pytest.skip("JAX's CUDA plugin is not installed")
    record = json.loads(done.stdout)
    assert record["estimated_bytes"] == pytest.approx(record["device_bytes"], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [("8", "2", "0"), ("8", "1", "0"), ("2", "1", "5")],
)
def test_estimate_holds_for_the_scores_of_attention(flags):
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


@pytest.mark.slow
def test_estimate_names_a_change_that_makes_the_3b_fit_a_card():
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


@pytest.mark.slow
def test_estimate_asks_the_compiler_that_is_always_there():
    done = estimate("--config", "tiny", "--devices", "2", "--compile", "--json", unoptimized="1")
    record = json.loads(done.stdout)
    assert record["compiler"] == "cpu" and record["sent_bytes"] >= record["least_bytes"] > 0
    assert record["device_bytes"] != record["estimated_bytes"]


def test_estimate_prints_no_number_that_says_nothing():
    done = estimate("--config", "tiny", "--device", "h100")
    assert done.returncode == 0 and "it fits by the estimate" in done.stdout
    assert "on each of 1 x h100-80gb (data 1, fsdp 1, tensor 1), 1 micro-batch:" in done.stdout
    assert " 0.00 GiB" not in done.stdout and "1 micro-batches" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "tpu"], "--device tpu: choose one of b200-180gb, "),
        (["--device", "a100"], "--device a100: choose one of a100-80gb, a100-40gb"),
        (["--devices", "0"], "--devices 0: must be from 1 to 100000"),
        (["--devices", "3"], "batch_size=64: must be a multiple of the 3 devices"),
    ],
)
def test_estimate_answers_a_mistake_in_one_line(flags, message):
    done = estimate("--config", "3b", *flags)
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_state_in_host_memory_is_an_error_on_a_platform_without_it(train_config, monkeypatch):
    config = train_config(optim={"state_memory": "pinned_host"})
    mesh = make_mesh(config.mesh)
    make_layout(config, mesh)
    with pytest.raises(RuntimeError, match="optim.state_memory=pinned_host.* keeps no state"):
        check_offload("HloModule m, entry_computation_layout={(f32[4]{0})->f32[4]{0}}")
    device = SimpleNamespace(
        device_kind="TPU v1", addressable_memories=lambda: [SimpleNamespace(kind="device")]
    )
    monkeypatch.setitem(vars(mesh), "local_devices", [device])
    with pytest.raises(InputError, match="optim.state_memory=pinned_host: .* has only device mem"):
        make_layout(config, mesh)


def test_activations_by_remat_knows_every_mode_of_either_gradient(train_config):
    """A config with autodiff can be estimated, whatever it would remat."""
    config = train_config(model={"integrator_gradient": "autodiff"})
    by_remat = memory.activations_by_remat(config, make_mesh(config.mesh))
    assert set(by_remat) == {"none", "integrator", "all_but_integrator", "block"}
