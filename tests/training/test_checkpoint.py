import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from conftest import assert_same

from inl_jax.config import InputError, MeshConfig, to_json
from inl_jax.data.tokenizer import load_tokenizer, train_bpe
from inl_jax.parallel.sharding import make_mesh, num_bytes
from inl_jax.training.checkpoint import Checkpoints, read_params
from inl_jax.training.run_dir import check_run, read_config, record_run
from inl_jax.training.state import TrainState, make_layout, split_state

CONFIG = {"model": {"param_dtype": "bfloat16", "num_layers": 1}, "accumulate_steps": 2}


def mesh_of(data, fsdp, tensor):
    return make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))


def abstract_of(config, *shape):
    """The state of a run with masters, as a checkpoint holds it."""
    return split_state(make_layout(config, mesh_of(*shape)))


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


def restore(run_dir, abstract, *, report=print):
    checkpoints = Checkpoints(run_dir, keep_last=10)
    try:
        return checkpoints.restore(abstract, report=report)
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
def test_a_state_comes_back_bit_exact_on_any_topology(run_dir, config, shape):
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
from inl_jax import checkpoint, train
from inl_jax.config import from_json
from inl_jax.parallel.sharding import make_mesh
from inl_jax.training.step import make_layout, split_state

what, config = sys.argv[1], from_json(sys.argv[2])
if what == "train":
    train(config)
else:
    state = split_state(make_layout(config, make_mesh(config.mesh)))
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


def test_parameters_are_readable_alone(run_dir, config):
    shutil.rmtree(run_dir / "checkpoints/2/optimizer")
    abstract = abstract_of(config, 1, 1, 1)
    for asked, expected in [("latest", 3), (2, 2), ("2", 2)]:
        step, params = read_params(run_dir, config.model, step=asked)
        assert step == expected
        assert_same(params, filled(abstract, expected)["params"])

    shardings = jax.tree.map(lambda a: a.sharding, abstract_of(config, 1, 4, 1)["params"])
    _, params = read_params(run_dir, config.model, shardings=shardings)
    assert params["embedding"].sharding == shardings["embedding"]


def test_an_unknown_step_lists_those_that_exist(run_dir, config):
    with pytest.raises(InputError, match=r"no checkpoint 7; there are \[1, 2, 3\]"):
        read_params(run_dir, config.model, step=7)
    with pytest.raises(InputError, match="no checkpoint 'best'"):
        read_params(run_dir, config.model, step="best")
    with pytest.raises(InputError, match="there are none"):
        read_params(run_dir / "nothing", config.model)


def test_no_checkpoint_is_no_error(tmp_path, config):
    assert restore(tmp_path / "new", abstract_of(config, 1, 1, 1)) is None


def test_the_newest_and_the_best_are_kept(config):
    tree = filled(abstract_of(config, 1, 1, 1), 0)
    checkpoints = Checkpoints(config.run_dir, keep_last=2)
    for step, loss in enumerate([3.0, 1.0, 2.0, float("nan"), 1.5, 4.0], start=1):
        checkpoints.save(step, **tree, position={"data": ""})
        checkpoints.note_validation(step, loss)
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


DAMAGES = {
    "truncated": truncate,
    "data truncated": truncate_data,
    "half deleted": delete_half,
    "empty": empty,
    "no params": without("params"),
    "no optimizer": without("optimizer"),
    "no position": lambda step_dir: (step_dir / "_CHECKPOINT_METADATA").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_for_the_next_older(run_dir, config, damage):
    damage(run_dir / "checkpoints/3")
    lost = contents(run_dir / "checkpoints/3")
    if damage not in (DAMAGES["no optimizer"], DAMAGES["no position"]):
        with pytest.raises(InputError, match="3 is damaged"):
            read_params(run_dir, config.model, step=3)
    abstract, lines = abstract_of(config, 2, 2, 2), []
    checkpoints = Checkpoints(run_dir, keep_last=10)
    found = checkpoints.restore(abstract, report=lines.append)
    assert found["step"] == 2
    assert_same({name: found[name] for name in abstract}, filled(abstract, 2))

    (aside,) = (run_dir / "damaged").iterdir()
    assert contents(aside) == lost
    assert len(lines) == 1 and "checkpoint 3" in lines[0] and str(aside) in lines[0]
    assert "\n" not in lines[0]

    # The run goes on and saves that step again.
    assert checkpoints.latest_step() == 2
    checkpoints.save(3, **filled(abstract, 33), position={"data": ""})
    checkpoints.close()
    found = restore(run_dir, abstract)
    assert found["step"] == 3
    assert_same({name: found[name] for name in abstract}, filled(abstract, 33))


def test_where_all_are_damaged_nothing_is_moved(run_dir, config):
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
    ],
)
def test_another_model_is_refused_by_the_leaf_and_nothing_is_moved(
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


def start_run(config, tokenizer, report=print):
    check_run(config, tokenizer, report=report)
    record_run(config, tokenizer)


def test_a_save_is_not_touched_by_what_happens_to_the_arrays_next(config):
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


BYTES = load_tokenizer("bytes")


@pytest.mark.parametrize(
    "change, named",
    [
        ({"d_ff": 64}, "model.d_ff=64,.* has model.d_ff=32"),
        ({"kappa": 2.0}, "model.kappa=2.0,.* has model.kappa=1.0"),
        ({"param_dtype": "float32"}, "model.param_dtype=float32,.* has model.param_dtype=bfloat16"),
    ],
)
def test_a_run_does_not_go_on_with_another_model(config, change, named):
    start_run(config, BYTES)
    before = contents(config.run_dir)
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, **change))
    with pytest.raises(InputError, match=named):
        start_run(other, BYTES)
    assert contents(config.run_dir) == before
    assert read_config(config.run_dir) == config


def test_a_run_does_not_go_on_with_another_kind_of_optimizer_state(config):
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


def test_a_run_does_not_go_on_with_another_tokenizer(config):
    start_run(config, BYTES)
    with pytest.raises(InputError, match=r"data.tokenizer=bpe:260 .* has bytes \(257 ids"):
        start_run(config, train_bpe(["some text, some text"] * 9, 260))


def test_a_run_may_go_on_with_another_recipe_and_says_so(config):
    start_run(config, BYTES)
    other = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, remat="block", attention_kernel="xla"),
        optim=dataclasses.replace(config.optim, learning_rate=1e-4),
        num_steps=20,
    )
    lines = []
    start_run(other, BYTES, report=lines.append)
    changed = " ".join(lines)
    for part in (
        "model.remat none -> block",
        "model.attention_kernel auto -> xla",
        "optim.learning_rate 0.01 -> 0.0001",
        "8 -> 20",
    ):
        assert part in changed
    assert len(lines) == 4 and read_config(config.run_dir) == other
    start_run(other, BYTES, report=pytest.fail)


def test_what_is_no_run_directory_is_named(tmp_path):
    with pytest.raises(InputError, match="no config.json"):
        read_config(tmp_path)


def test_only_a_lower_validation_loss_becomes_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    for step, loss in [(1, float("nan")), (2, 2.0), (3, 3.0), (4, float("inf"))]:
        checkpoints.note_validation(step, loss)
    checkpoints.close()
    best = json.loads((tmp_path / "best.json").read_text())
    assert (best["step"], best["validation_loss"]) == (2, 2.0)
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.note_validation(5, 9.0, basis="other validation text")
    checkpoints.close()
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 5
