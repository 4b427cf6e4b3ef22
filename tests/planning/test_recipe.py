import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import mesh_of
from hypothesis import given, settings
from hypothesis import strategies as st

from inl_jax import trainer
from inl_jax.config import MeshConfig, ModelConfig, TrainConfig, with_fields
from inl_jax.config_file import load_config
from inl_jax.model.platform.device import H100, made_for
from inl_jax.parallel.sharding import batch_shards, fit_to_mesh
from inl_jax.planning import memory, recipe
from inl_jax.planning.hardware import find_gpu
from inl_jax.planning.preflight import make_plan
from inl_jax.storage.run_dir import read_config
from inl_jax.training.state import make_layout

AUTO = {"accumulate_steps": "auto", "model.remat": "auto"}
WIDE = ModelConfig(d_model=256, num_layers=8, num_iterations=6, d_ff=1024, max_seq_len=512)
MODELS = {
    "wide": WIDE,
    "without the integrator": dataclasses.replace(WIDE, num_iterations=0),
    "autodiff": dataclasses.replace(WIDE, integrator_gradient="autodiff"),
    "segments": dataclasses.replace(WIDE, integrator_segment=3, context="attention"),
}


def open_run(model=WIDE, batch_size=24, mesh=None):
    """A run with an open recipe, fitted to a mesh of virtual devices; its mesh and layout."""
    mesh = mesh or mesh_of()
    config = with_fields(TrainConfig(model=model, batch_size=batch_size), AUTO)
    return fit_to_mesh(config, mesh), mesh, layout_of(model, mesh)


@functools.cache
def layout_of(model, mesh):
    return make_layout(TrainConfig(model=model), mesh)


@pytest.fixture
def on_h100():
    """What is planned is planned for a GPU."""
    with made_for(H100):
        yield


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=12, deadline=None)
@given(batch_size=st.integers(1, 60), shares=st.tuples(*[st.floats(0, 1.5)] * 2))
def test_recipe_fits_is_as_fast_as_any_that_fits_and_gains_by_memory(model, batch_size, shares):
    run = open_run(MODELS[model], batch_size)
    found = {one.config: one for one in recipe.recipes(*run)}
    least, most = (edge(one.num_bytes for one in found.values()) for edge in (min, max))
    amounts = sorted(least + share * (most - least) for share in shares)
    chosen = [found[recipe.choose(*run, amount)] for amount in amounts]
    for mine, amount in zip(chosen, amounts, strict=True):
        fitting = [one for one in found.values() if recipe.MARGIN * one.num_bytes <= amount]
        if fitting:
            assert mine in fitting
            assert mine.time <= recipe.ALIKE * min(one.time for one in fitting)
        else:
            assert mine.num_bytes == least
    assert chosen[0].num_bytes <= chosen[1].num_bytes and chosen[0].time >= chosen[1].time


def test_recipe_leaves_what_is_explicit_as_it_is(on_h100):
    config, mesh, layout = open_run()
    plenty = 2**60
    explicit = with_fields(config, {"accumulate_steps": 24, "model.remat": "integrator"})
    assert recipe.choose(explicit, mesh, layout, 0) == explicit
    for name in AUTO:
        half = with_fields(explicit, {name: "auto"})
        kept, chosen = {*AUTO} - {name}, recipe.choose(half, mesh, layout, plenty)
        assert chosen == with_fields(
            explicit, {name: "all_but_integrator" if "remat" in name else 1}
        )
        assert recipe.explain(half, chosen, mesh, layout, plenty).startswith(
            f"{name.removeprefix('model.')} auto: "
        )
        assert all(kept not in recipe.explain(half, chosen, mesh, layout, plenty) for kept in kept)
    assert recipe.explain(explicit, explicit, mesh, layout, 0) == (
        "24 micro-batches of 1 sequence, remat integrator, as asked"
    )


def test_recipe_gives_every_device_of_a_mesh_whole_rows(on_h100):
    for shape in ((2, 1, 1), (2, 2, 2), (1, 8, 1)):
        config, mesh, layout = open_run(batch_size=48, mesh=mesh_of(*shape))
        for one in recipe.recipes(config, mesh, layout):
            rows, left = divmod(48, one.config.accumulate_steps * batch_shards(mesh))
            assert rows >= 1 and left == 0
            assert fit_to_mesh(one.config, mesh) == one.config
    # A number is lowered to fit the mesh although the other field is auto, and both are said.
    asked = with_fields(config, {"accumulate_steps": 48})
    chosen = recipe.choose(fit_to_mesh(asked, mesh), mesh, layout, 2**60)
    assert (chosen.accumulate_steps, chosen.model.remat) == (6, "all_but_integrator")
    line = recipe.explain(asked, chosen, mesh, layout, 2**60)
    assert line.startswith("accumulate_steps 48 -> 6, so that each of 8 devices") and line.count(
        "remat auto: 6 micro-batches of 1 sequence on each device, remat all_but_integrator: "
    )


def test_recipe_of_the_3b_takes_four_sequences_at_a_time_on_80_gb(on_h100):
    mesh = mesh_of()
    config = load_config("3b")
    layout, usable = make_layout(config, mesh), find_gpu("h100").usable_memory
    chosen = recipe.choose(config, mesh, layout, usable)
    line = recipe.explain(config, chosen, mesh, layout, usable)
    assert (chosen.accumulate_steps, chosen.model.remat) == (16, "block")
    head = "accumulate_steps auto and remat auto: 16 micro-batches of 4 sequences, remat block: "
    assert line.startswith(head) and " GiB of 73.28 GiB; 8 micro-batches of 8 sequences, " in line


def test_recipe_on_a_cpu_keeps_the_iterations_and_takes_few_sequences_at_a_time():
    """A CPU takes so long for a token that a micro-batch costs little beside its tokens."""
    config, mesh, layout = open_run()
    here = recipe.choose(config, mesh, layout, 2**60, shared=True)
    assert (here.accumulate_steps, here.model.remat) == (8, "all_but_integrator")
    with made_for(H100):
        assert recipe.choose(config, mesh, layout, 2**60).accumulate_steps == 1


def test_recipe_says_if_none_fits():
    config, mesh, layout = open_run()
    least = recipe.recipes(config, mesh, layout)[0]
    line = recipe.explain(config, least.config, mesh, layout, least.num_bytes - 1)
    assert line.endswith(", and every other choice needs more")


def test_memory_of_each_is_that_of_the_smallest_device_of_all_processes(monkeypatch):
    def device(limit):
        return SimpleNamespace(memory_stats=lambda: {"bytes_limit": limit}, device_kind=f"G{limit}")

    mesh = SimpleNamespace(local_devices=[device(9), device(7), device(8)])
    assert memory.memory_found(mesh) == (7, "G7, the share JAX may use")
    monkeypatch.setattr(recipe.processes, "gather", lambda mine: [mine, "5", "11"])
    assert recipe.memory_of_each(mesh) == 5


@pytest.mark.slow  # the default tests of `train` resume with the recipe as it was
def test_run_resumed_on_a_smaller_device_chooses_anew_with_equal_results(
    train_config, monkeypatch, said
):
    """The same updates on the same data, with equal losses; the asked config is recorded."""

    def run(name, *sizes, mesh=1):
        """Trains 4 updates on a device of each size in turn, as the largest or least recipe."""
        for number, place in enumerate(sizes, start=1):
            config = train_config(
                model={"remat": "auto", "num_layers": 6},
                accumulate_steps="auto",
                run_dir=f"{train_config().run_dir}-{name}",
                mesh=MeshConfig(data=mesh if number == len(sizes) else 1),
            )
            plan = make_plan(config)
            held = recipe.recipes(config, plan.mesh, plan.layout)[place].num_bytes
            there = lambda _, n=1.5 * held: (int(n), "free")  # noqa: E731
            for module in (recipe, "inl_jax.planning.preflight"):
                monkeypatch.setattr(f"{getattr(module, '__name__', module)}.memory_found", there)
            stop = (lambda r: r["step"] < 4 or 1 / 0) if number < len(sizes) else None
            try:
                result = trainer.train(config, on_record=stop)
            except ZeroDivisionError:
                continue
        assert read_config(config.run_dir) == config
        starts = json.loads((Path(config.run_dir) / "env.json").read_text())["starts"]
        recipes = [start["recipe"] for start in starts]
        assert all(one.pop("why").startswith("accumulate_steps auto and rem") for one in recipes)
        return result, recipes

    large, (alone,) = run("large", -1)
    assert alone == {"remat": "all_but_integrator", "micro_batches": 1}
    for name, mesh in (("smaller", 1), ("wider", 2)):
        other, (first, second) = run(name, -1, 0, mesh=mesh)
        assert first == alone != second
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), large.params, other.params
        )
        losses = [[r["loss"] for r in done.history if "loss" in r] for done in (large, other)]
        np.testing.assert_allclose(*losses, rtol=1e-4)
    assert not any("changed since the last start: accumulate_steps" in line for line in said)
