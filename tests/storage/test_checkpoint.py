import dataclasses
import functools
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from conftest import assert_same, mesh_of
from damages import damage as damage_one
from mixer_cases import FIELDS, PATTERN

from inl_jax.config import InputError, MeshConfig
from inl_jax.config_file import to_json
from inl_jax.failures import DiskFull, MachineFailure
from inl_jax.parallel.sharding import num_bytes
from inl_jax.storage import checkpoint, weights
from inl_jax.storage.checkpoint import Checkpoints
from inl_jax.storage.identity import Identity
from inl_jax.storage.run_dir import record_run
from inl_jax.storage.weights import read_params
from inl_jax.tokens.tokenizer import load_tokenizer
from inl_jax.training.state import TrainState, make_layout, split_state

CONFIG = {"model": {"param_dtype": "bfloat16", "num_layers": 1}, "accumulate_steps": 2}


def abstract_of(config, *shape):
    """The state of a run with masters, as a checkpoint holds it."""
    return split_state(make_layout(config, mesh_of(*shape)).state)


def filled(abstract, seed):
    """Arrays of random bits that no rounding or cast would leave alone."""
    rng = np.random.default_rng(seed)

    def leaf(a):
        if jnp.issubdtype(a.dtype, jnp.integer):
            value = rng.integers(0, 1000, a.shape).astype(a.dtype)
        else:
            value = rng.normal(size=a.shape).astype(
                ml_dtypes.bfloat16 if a.dtype == jnp.bfloat16 else a.dtype
            )
        return jax.device_put(value, a.sharding)

    return jax.tree.map(leaf, abstract)


def save(run_dir, trees, *, keep_last=10):
    """Saves `{step: tree}`."""
    checkpoints = Checkpoints(run_dir, keep_last=keep_last)
    for step, tree in trees.items():
        checkpoints.save(step, **tree, position={"samples_seen": 8 * step, "data": "abc"})
    checkpoints.close()


def restore(run_dir, abstract, identity=None):
    checkpoints = Checkpoints(run_dir, keep_last=10, identity=identity)
    try:
        return checkpoints.restore(abstract)
    finally:
        checkpoints.close()


def contents(folder):
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*"))


@pytest.fixture
def config(train_config):
    return train_config(**CONFIG)


@pytest.fixture
def run_dir(saved_run, config):
    """A run of its own with steps 1, 2 and 3 saved from eight devices."""
    shutil.copytree(saved_run, config.run_dir)
    return Path(config.run_dir)


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    return tmp_path_factory.mktemp("saved") / "run"


@pytest.fixture(autouse=True)
def _save_once(saved_run, train_config):
    if not saved_run.exists():
        abstract = abstract_of(train_config(**CONFIG), 2, 2, 2)
        save(saved_run, {step: filled(abstract, step) for step in (1, 2, 3)})


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 4, 1), (3, 1, 1), (1, 1, 1)])
def test_restore_is_bit_exact_on_any_topology(run_dir, config, shape):
    abstract = abstract_of(config, *shape)
    masters = optax.tree.get(abstract["optimizer"]["opt_state"]["rest"], "masters")
    assert masters["embedding"].dtype == jnp.float32

    found = restore(run_dir, abstract)
    assert (found["step"], found["position"]) == (3, {"samples_seen": 24, "data": "abc"})
    tree = {name: found[name] for name in abstract}
    assert_same(tree, filled(abstract_of(config, 1, 1, 1), 3))
    jax.tree.map(
        lambda a, x: x.sharding.is_equivalent_to(a.sharding, x.ndim) or pytest.fail(),
        abstract,
        tree,
    )
    TrainState(params=found["params"], **found["optimizer"])


# Trains, or does what a resumed run does before its first update; prints its peak memory in bytes.
PEAK = """
import resource, sys
import jax
from inl_jax import train
from inl_jax.config_file import from_json
from inl_jax.parallel.sharding import make_mesh
from inl_jax.storage import checkpoint
from inl_jax.training.state import make_layout, split_state

what, config = sys.argv[1], from_json(sys.argv[2])
if what == "train":
    train(config)
else:
    state = split_state(make_layout(config, make_mesh(config.mesh)).state)
    checkpoints = checkpoint.Checkpoints(config.run_dir, keep_last=2)
    jax.block_until_ready(checkpoints.restore(state)["optimizer"])
    checkpoints.close()
print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_restoring_needs_less_memory_than_training(train_config, devices):
    config = train_config(
        model={"d_model": 512, "d_ff": 2048, "num_layers": 12},
        num_steps=3,
        eval_every=0,
        mesh=MeshConfig(data=1, fsdp=devices),
        batch_size=devices,
        save_every=0,
    )
    peaks = {}
    for what in ("train", "restore"):
        env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        command = [sys.executable, "-c", PEAK, what, to_json(config)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        peaks[what] = int(done.stdout.splitlines()[-1])
    held = num_bytes(make_layout(config, mesh_of(1, 1, 1)))
    print(f"{devices} devices: state {held:,}, peak {peaks}")
    assert held < peaks["restore"] < peaks["train"]


def test_read_params_needs_no_optimizer(run_dir, config):
    shutil.rmtree(run_dir / "checkpoints/2/optimizer")
    abstract = abstract_of(config, 1, 1, 1)
    for asked, expected in [("latest", 3), (2, 2), ("2", 2)]:
        step, params = read_params(run_dir, config.model, step=asked)
        assert step == expected
        assert_same(params, filled(abstract, expected)["params"])

    shardings = jax.tree.map(lambda a: a.sharding, abstract_of(config, 1, 4, 1)["params"])
    _, params = read_params(run_dir, config.model, shardings=shardings)
    assert params["embedding"].sharding == shardings["embedding"]


def test_read_params_lists_the_steps_that_exist(run_dir, config):
    with pytest.raises(InputError, match=r"no checkpoint 7; there are \[1, 2, 3\]"):
        read_params(run_dir, config.model, step=7)
    with pytest.raises(InputError, match="no checkpoint 'best'"):
        read_params(run_dir, config.model, step="best")
    with pytest.raises(InputError, match="there are none"):
        read_params(run_dir / "nothing", config.model)


def test_restore_finds_none_in_an_empty_run(tmp_path, config):
    assert restore(tmp_path / "new", abstract_of(config, 1, 1, 1)) is None


def note_if_best(checkpoints, step, loss, **basis):
    if checkpoints.is_best(loss, **basis):
        checkpoints.note_best(step, loss, **basis)


def test_checkpoints_keep_the_newest_and_the_best(config):
    tree = filled(abstract_of(config, 1, 1, 1), 0)
    checkpoints = Checkpoints(config.run_dir, keep_last=2)
    for step, loss in enumerate([3.0, 1.0, 2.0, float("nan"), 1.5, 4.0], start=1):
        checkpoints.save(step, **tree, position={"data": ""})
        note_if_best(checkpoints, step, loss)
    assert checkpoints.latest_step() == 6
    checkpoints.close()
    folder = Path(config.run_dir) / "checkpoints"
    assert sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) == [2, 5, 6]
    assert read_params(config.run_dir, config.model, step="best")[0] == 2


def truncate(step_dir):
    for file in step_dir.rglob("*"):
        if file.is_file() and file.stat().st_size > 100:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def truncate_data(step_dir):
    for file in step_dir.rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def delete_half(step_dir):
    for file in sorted(p for p in step_dir.rglob("*") if p.is_file())[::2]:
        file.unlink()


def empty(step_dir):
    shutil.rmtree(step_dir)
    step_dir.mkdir()


def without(name):
    return lambda step_dir: shutil.rmtree(step_dir / name)


def unknown_key(step_dir):
    """Metadata that Orbax refuses when it opens the whole directory."""
    path = step_dir / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace("init_timestamp_nsecs", "init_times|amp_nsecs"))


DAMAGES = {
    "truncated": truncate,
    "data truncated": truncate_data,
    "half deleted": delete_half,
    "empty": empty,
    "no params": without("params"),
    "no optimizer": without("optimizer"),
    "unknown key": unknown_key,
    "no position": lambda step_dir: (step_dir / "_CHECKPOINT_METADATA").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_restore_sets_a_damaged_checkpoint_aside_for_the_next_older(run_dir, config, damage, said):
    damage(run_dir / "checkpoints/3")
    lost = contents(run_dir / "checkpoints/3")
    if damage not in (DAMAGES["no optimizer"], DAMAGES["no position"]):
        with pytest.raises(InputError, match="3 is damaged"):
            read_params(run_dir, config.model, step=3)
    abstract = abstract_of(config, 2, 2, 2)
    checkpoints = Checkpoints(run_dir, keep_last=10)
    found = checkpoints.restore(abstract)
    assert found["step"] == 2
    assert_same({name: found[name] for name in abstract}, filled(abstract, 2))

    (aside,) = (run_dir / "damaged").iterdir()
    assert contents(aside) == lost
    assert len(said) == 1 and "checkpoint 3" in said[0] and str(aside) in said[0]
    assert "\n" not in said[0]

    # The run continues, and saves that step again.
    assert checkpoints.latest_step() == 2
    checkpoints.save(3, **filled(abstract, 33), position={"data": ""})
    checkpoints.close()
    found = restore(run_dir, abstract)
    assert found["step"] == 3
    assert_same({name: found[name] for name in abstract}, filled(abstract, 33))


def test_restore_moves_nothing_if_all_are_damaged(run_dir, config):
    for step, damage in zip((1, 2, 3), (empty, delete_half, truncate), strict=True):
        damage(run_dir / f"checkpoints/{step}")
    before = contents(run_dir)
    with pytest.raises(InputError, match="no checkpoint can be read") as caught:
        restore(run_dir, abstract_of(config, 1, 1, 1))
    assert "\n" not in str(caught.value)
    assert contents(run_dir) == before


@pytest.mark.parametrize(
    "change, leaf",
    [
        (
            {"d_ff": 48},
            r"_kernel is saved as bfloat16\[1, 32, 16\], .* wants bfloat16\[1, 48, 16\]",
        ),
        ({"param_dtype": "float32"}, "is saved as bfloat16.* wants float32"),
        ({"context": "mean"}, "decay_logit is saved as .* wants nothing"),
        ({"context": "gated"}, "decay_kernel is saved as nothing, .* wants bfloat16"),
        (FIELDS[PATTERN] | {"num_layers": 2}, "blocks/layer_0/.* is saved as nothing"),
    ],
)
def test_restore_refuses_another_model_by_the_leaf_and_moves_nothing(
    run_dir, train_config, change, leaf
):
    """A newer damaged checkpoint stays where it is, too."""
    empty(run_dir / "checkpoints/3")
    before = contents(run_dir)
    config = train_config(**CONFIG | {"model": CONFIG["model"] | change})
    with pytest.raises(InputError, match=leaf):
        restore(run_dir, abstract_of(config, 1, 1, 1))
    with pytest.raises(InputError, match=leaf):
        read_params(run_dir, config.model, step=2)
    assert contents(run_dir) == before


def test_save_is_not_touched_by_later_use_of_the_arrays(config):
    abstract = abstract_of(config, 2, 2, 2)
    tree, expected = filled(abstract, 5), filled(abstract, 5)
    spoil = jax.jit(
        functools.partial(jax.tree.map, jnp.zeros_like), donate_argnums=0, keep_unused=True
    )
    checkpoints = Checkpoints(config.run_dir, keep_last=1)
    checkpoints.save(1, **tree, position={"data": ""})
    spoiled = jax.block_until_ready(spoil(tree))
    assert not any(leaf.any() for leaf in jax.tree.leaves(spoiled))
    checkpoints.close()
    found = restore(config.run_dir, abstract)
    assert_same({name: found[name] for name in abstract}, expected)


def test_is_best_takes_only_a_lower_loss_on_the_same_basis(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    for step, loss in [(1, float("nan")), (2, 2.0), (3, 3.0), (4, float("inf"))]:
        note_if_best(checkpoints, step, loss)
    checkpoints.close()
    best = json.loads((tmp_path / "best.json").read_text())
    assert (best["step"], best["validation_loss"]) == (2, 2.0)
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    note_if_best(checkpoints, 5, 9.0, basis="other validation text")
    checkpoints.close()
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 5


@pytest.mark.parametrize(
    "text",
    ['{"step": "x", "validation_loss": 1.0}', '{"step": 3, "validation_loss": null}', "[]", "{"],
)
def test_damaged_note_of_the_best_counts_as_none(tmp_path, text):
    (tmp_path / "best.json").write_text(text)
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    assert checkpoints.best_step() is None and checkpoints.is_best(2.0)
    checkpoints.resume_from(0)
    checkpoints.close()


@pytest.mark.parametrize("saves", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_save_leaks_no_thread_and_no_file_descriptor(tmp_path, saves):
    """Orbax frees both only in the `result()` of a save's response (a run died at save 339)."""

    def held():
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    checkpoints = Checkpoints(tmp_path, keep_last=1)
    counts = []
    for step in range(1, saves + 1):
        checkpoints.save(step, {"w": jnp.ones(3)}, position={"samples_seen": step})
        if step in (4, saves):
            checkpoints.wait()
            counts.append(held())
    checkpoints.close()
    early, late = counts
    # A thread of the last save may still be ending.
    assert late[0] <= early[0] + 1 and late[1] <= early[1], (early, late)


def small(step):
    return {"params": {"w": jnp.full(300, step / 3)}, "optimizer": {"m": jnp.full(300, step / 7)}}


def save_small(run_dir, *steps, keep_last=10):
    checkpoints = Checkpoints(run_dir, keep_last=keep_last)
    for step in steps:
        checkpoints.save(step, **small(step), position={"samples_seen": step})
    checkpoints.close()


def restore_small(run_dir, identity=None):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    tree = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), small(1))
    return restore(run_dir, tree, identity)


@pytest.mark.parametrize("count", [8, pytest.param(300, marks=pytest.mark.slow)])
def test_restore_loads_no_damaged_checkpoint_in_silence(tmp_path, count, said):
    save_small(tmp_path / "saved", 1, 2)
    rng = random.Random(0)
    for i in range(count):
        shutil.copytree(tmp_path / "saved", tmp_path / str(i))
        what = damage_one(tmp_path / str(i) / "checkpoints/2", rng).what
        said.clear()
        found = restore_small(tmp_path / str(i))
        assert said, what
        assert_same({name: found[name] for name in small(1)}, small(found["step"]))
        assert found["position"] == {"samples_seen": found["step"]}, what
        shutil.rmtree(tmp_path / str(i))


@pytest.mark.parametrize("count", [6, pytest.param(100, marks=pytest.mark.slow)])
def test_read_params_loads_no_damaged_checkpoint_in_silence(run_dir, config, count, said):
    expected, rng = filled(abstract_of(config, 1, 1, 1), 3)["params"], random.Random(1)
    (run_dir / "checkpoints/3/optimizer").rename(run_dir / "unneeded")
    for _ in range(count):
        done = damage_one(run_dir / "checkpoints/3", rng)
        said.clear()
        try:
            _, params = read_params(run_dir, config.model)
        except InputError as error:
            assert "3 is damaged" in str(error) and "\n" not in str(error)
        else:
            assert said, done.what
            assert_same(params, expected)
        done.undo()


def test_restore_takes_a_checkpoint_without_manifest_and_says_so(tmp_path, said):
    """A kill between the commit of a checkpoint and its manifest must not lose it."""
    save_small(tmp_path, 1, 2)
    (tmp_path / "checkpoints/2/manifest.json").unlink()
    assert restore_small(tmp_path)["step"] == 2
    assert said == ["checkpoint 2 is not verified: it has no manifest"]


def test_restore_says_that_the_newest_checkpoint_is_gone(tmp_path, said):
    save_small(tmp_path, 1, 2)
    shutil.rmtree(tmp_path / "checkpoints/2")
    assert restore_small(tmp_path)["step"] == 1
    assert said == ["WARNING: checkpoint 2 was saved here and is gone; 1 is the newest left"]


def test_the_last_good_checkpoint_outlives_newer_ones_that_nothing_vouches_for(
    tmp_path, monkeypatch
):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(1, **small(1), position={"a": 1})
    checkpoints.wait()
    monkeypatch.setattr(Checkpoints, "_seal", lambda self, step, saving: not saving.result())
    for step in (2, 3):
        checkpoints.save(step, **small(step), position={"a": 1})
        checkpoints.wait()
    assert checkpoints.steps() == {1, 3}
    monkeypatch.undo()
    checkpoints.save(4, **small(4), position={"a": 1})
    checkpoints.wait()
    assert checkpoints.steps() == {4}
    checkpoints.close()


def test_a_checkpoint_is_set_aside_twice_within_a_second(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.time, "strftime", lambda _: "now")
    for _ in range(2):
        (tmp_path / "8").mkdir()
        checkpoint._move_aside(tmp_path / "8", tmp_path / "damaged")
    assert contents(tmp_path / "damaged") == ["8-now", "8-now-1"]


def test_read_params_looks_again_if_a_training_deletes_the_checkpoint(run_dir, config, monkeypatch):
    verify, moved = weights.verify, []

    def verify_late(step_dir, **share):
        if not moved:  # a newer one is saved, and the one chosen goes
            moved.append(step_dir)
            shutil.copytree(run_dir / "checkpoints/2", run_dir / "checkpoints/4")
            (run_dir / "checkpoints/4/manifest.json").unlink()
            shutil.rmtree(step_dir)
        return verify(step_dir, **share)

    monkeypatch.setattr(weights, "verify", verify_late)
    assert read_params(run_dir, config.model)[0] == 4
    moved.clear()
    with pytest.raises(InputError, match=r"no checkpoint 2; there are \[1, 4\]"):
        shutil.rmtree(run_dir / "checkpoints/4")
        read_params(run_dir, config.model, step=2)


@pytest.fixture
def short_files():
    """Lets no file grow beyond 20 kB, as a quota does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line_and_leaves_the_newest_checkpoint(tmp_path, request, caplog):
    save_small(tmp_path, 1)
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    request.getfixturevalue("short_files")
    noise = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    with pytest.raises(DiskFull, match=r"File too large; a checkpoint takes 0\.\d+ MiB, .* free"):
        checkpoints.save(2, {"w": jnp.asarray(noise)}, position={"a": 1})
        checkpoints.wait()
    checkpoints.close()
    assert os.listdir(tmp_path / "checkpoints") == ["1"]
    assert not [entry for entry in caplog.records if entry.exc_info]
    assert restore_small(tmp_path)["step"] == 1


def test_a_save_that_fails_otherwise_is_one_line(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").touch()
    with pytest.raises(MachineFailure, match="cannot be written") as caught:
        checkpoints.save(2, **small(2), position={"a": 1})
        checkpoints.wait()
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
    checkpoints.close()


def test_save_writes_a_run_directory_again_that_was_removed(config, said):
    identity = Identity(config, load_tokenizer("bytes"))
    record_run(*identity)
    checkpoints = Checkpoints(config.run_dir, keep_last=2, identity=identity)
    checkpoints.save(1, **small(1), position={"a": 1})
    checkpoints.wait()
    shutil.rmtree(config.run_dir)
    for step in (2, 3, 4):
        checkpoints.save(step, **small(step), position={"a": 1})
    checkpoints.close()
    run_dir = Path(config.run_dir)
    for folder in (run_dir, run_dir / "checkpoints/4"):
        assert {"config.json", "tokenizer.json"} <= {*os.listdir(folder)}
    assert restore_small(run_dir)["step"] == 4
    assert "written again" in said[0]


def test_restore_says_that_a_checkpoint_is_of_another_run(config, tmp_path, said):
    other = dataclasses.replace(config, seed=7, run_dir=str(tmp_path / "other"))
    for run in (other, config):
        identity = Identity(run, load_tokenizer("bytes"))
        record_run(*identity)
        checkpoints = Checkpoints(run.run_dir, keep_last=2, identity=identity)
        checkpoints.save(1, **small(1), position={"a": 1})
        checkpoints.close()
    for whose in (config, other):
        assert said == []
        copy = tmp_path / f"copy of seed {whose.seed}"
        shutil.copytree(whose.run_dir, copy)
        shutil.copy(Path(config.run_dir) / "config.json", copy)
        restore_small(copy, identity)
    assert "checkpoint 1 was saved with seed=7, but the last start of this run had 0" in said


def test_resume_from_forgets_a_best_that_was_abandoned(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    note_if_best(checkpoints, 12, 4.0)
    checkpoints.resume_from(12)
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 12
    checkpoints.resume_from(8)  # 12 is of another branch, which reached a loss of its own
    assert not (tmp_path / "best.json").exists()
    note_if_best(checkpoints, 12, 4.5)
    assert json.loads((tmp_path / "best.json").read_text())["validation_loss"] == 4.5
    checkpoints.close()
