import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inl_jax.config import MeshConfig, ModelConfig
from inl_jax.model import language_model as model
from inl_jax.model.dynamics import CONTROLLERS, Dynamics
from inl_jax.model.integrator import Integrator
from inl_jax.parallel.sharding import make_mesh, param_shardings
from inl_jax.watch.integrator_probe import (
    QUANTITIES,
    fixed_batch,
    measure_dynamics,
    watch_steps,
    watch_tokens,
)

TOKENS = np.random.default_rng(0).integers(0, 300, (3, 5))


def lively_params(config):
    """Random weights in which no part of the integrator is silent."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda a: jnp.asarray(rng.normal(0, 0.5, a.shape), a.dtype), model.abstract_params(config)
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"context": "gated", "num_layers": 4, "num_iterations": 2, "attention_every": 2},
        pytest.param(
            {"context": "decay", "integrator_chunk": 2, "remat": "block"}, marks=pytest.mark.slow
        ),
        pytest.param({"context": "mean", "kappa": float("inf")}, marks=pytest.mark.slow),
        pytest.param({"context": "attention", "num_iterations": 1}, marks=pytest.mark.slow),
    ],
)
def test_watched_steps_end_in_the_states_of_the_forward_pass(model_config, fields):
    """Of every layer, beside what the integrators of the whole model return."""
    config = model_config(**fields)
    params = lively_params(config)

    @jax.jit
    def both():
        kept = model.INLModel(config).apply(
            {"params": params},
            *(TOKENS, None, None, config.excitation_amplitude),
            mutable="intermediates",
            capture_intermediates=lambda module, _: isinstance(module, Integrator),
        )[1]["intermediates"]["blocks"]
        kept = model.by_layer(config, kept, "integrator")
        ((h, x),), (last,) = kept["inputs"], kept["__call__"]
        settings = {"amplitude": 0.03, "num_iterations": config.num_iterations}
        settings["dynamics"] = Dynamics(0.1, config.kappa, jnp.float32)
        watch = jax.vmap(lambda *arrays: watch_steps(*arrays, **settings)[0])
        return watch(model.by_layer(config, params["blocks"], "integrator"), h, x), last, x

    watched, last, first = both()
    np.testing.assert_allclose(watched, last, rtol=1e-5, atol=1e-6)
    assert jnp.abs(last - first).max(axis=(1, 2, 3)).min() > 0.01  # every layer moves


def test_watched_quantities_are_those_of_two_steps_by_hand(model_config):
    """Of one token, in float64; the loop below is the equations, written out once more."""
    config = model_config(d_model=6, controller_width=4, num_heads=1)
    dt, kappa, amplitude = 0.1, 1.0, 0.5
    with jax.enable_x64(True):
        rng = np.random.default_rng(2)
        shapes = model.abstract_params(config)["blocks"]["integrator"]
        p = {name: rng.normal(size=leaf.shape[1:]) for name, leaf in shapes.items()}
        h, x = rng.normal(size=(2, 6))
        watch = jax.jit(watch_steps, static_argnames=("num_iterations", "dynamics"))
        dynamics = Dynamics(dt, kappa, jnp.dtype("float64"))
        h_BSD, x_BSD = h[None, None], x[None, None]
        _, found = watch(p, h_BSD, x_BSD, amplitude=amplitude, num_iterations=2, dynamics=dynamics)
    v, before, wanted = np.zeros(6), None, {name: [] for name in QUANTITIES}
    for t in range(2):
        o = {}
        for q, name in enumerate(CONTROLLERS):
            r = h @ p["context_kernel"][:, q] + p["hidden_bias"][q]
            r = np.maximum(r + x @ p["state_kernel"][0, :, q] + v @ p["state_kernel"][1, :, q], 0)
            o[name] = r @ p["output_kernel"][q] + p["output_bias"][q]
        e = x - p["mu"]
        alpha = (1 - np.exp(-kappa * np.sqrt(np.mean(e**2)))) / (1 + np.exp(-o["alpha"]))
        beta, gate = np.log1p(np.exp(o["beta"])), 1 / (1 + np.exp(-o["gate"]))
        v = alpha * v + (1 - alpha) * o["candidate"] - beta * e
        v = v + amplitude * np.sin(p["gamma"] * t + p["phi"])
        step = dt * gate * v
        x = x + step
        cosine = np.nan
        if before is not None:
            cosine = step @ before / np.linalg.norm(step) / np.linalg.norm(before)
        before = step
        rms = [np.sqrt(np.mean(a**2)) for a in (x - p["mu"], step)]
        means = [alpha.mean(), beta.mean(), gate.mean()]
        values = [*rms, *means, (dt * gate * beta).max(), cosine]
        for name, value in zip(QUANTITIES, values, strict=True):
            wanted[name].append(value)
    for name in QUANTITIES:
        np.testing.assert_allclose(found[name][:, 0, 0], wanted[name], rtol=1e-6, err_msg=name)


@pytest.fixture
def decay_model(model_config):
    config = model_config()
    return config, lively_params(config)


def test_measured_dynamics_are_means_over_tokens_and_the_largest_stiffness(decay_model):
    config, params = decay_model
    watched = watch_tokens(config, params, TOKENS)
    found = measure_dynamics(config, params, TOKENS)
    assert list(found) == list(watched) == list(QUANTITIES)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for name, values in watched.items():
        assert values.shape == (2, 3, *TOKENS.shape)
        reduced = values.max(axis=(2, 3)) if name == "stiffness" else values.mean(axis=(2, 3))
        if name == "cosine":
            assert [layer[0] for layer in found[name]] == [None, None]
            assert np.abs(values[:, 1:]).max() <= 1.0001
            found[name], reduced = [layer[1:] for layer in found[name]], reduced[:, 1:]
        np.testing.assert_allclose(found[name], reduced, rtol=1e-6)


def test_measured_dynamics_of_a_mesh_are_those_of_one_device(decay_model):
    """Of three rows, which four batch shards do not divide."""
    config, params = decay_model
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    sharded = jax.device_put(params, param_shardings(mesh, config))
    alone = watch_tokens(config, params, TOKENS)
    for name, values in watch_tokens(config, sharded, TOKENS, mesh=mesh).items():
        np.testing.assert_allclose(values, alone[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_watched_tokens_with_bfloat16_products_stay_near_those_in_float32(decay_model):
    config, params = decay_model
    narrow = ModelConfig(**vars(config) | {"compute_dtype": "bfloat16"})
    wide = watch_tokens(config, params, TOKENS)
    for name, values in watch_tokens(narrow, params, TOKENS).items():
        assert values.dtype == np.float32
        np.testing.assert_allclose(values.mean(), wide[name].mean(), rtol=0.1)


def test_model_without_iterations_has_no_dynamics(model_config):
    config = model_config(num_iterations=0)
    assert measure_dynamics(config, lively_params(config), TOKENS) == {}


def test_training_is_the_same_program_as_without_the_probe(decay_model, monkeypatch):
    config, params = decay_model

    def program():
        def loss(params):
            return model.hidden_states(config, params, TOKENS).sum()

        return jax.jit(jax.grad(loss)).lower(params).as_text()

    with_probe = program()
    monkeypatch.setattr(Integrator, "sow", lambda *_: False)
    assert program() == with_probe


@pytest.mark.parametrize("words", [400, 60, 4])
def test_fixed_batch_is_the_same_each_time_and_has_no_padding(make_corpus, tmp_path, words):
    """Also of a split that is shorter than one sequence, or not a multiple of it."""
    (tmp_path / "text.txt").write_text(" ".join(f"word{i:03}" for i in range(words)))
    corpus, config = make_corpus(tmp_path / "text.txt"), ModelConfig(max_seq_len=64)
    batch = fixed_batch(corpus, config)
    split = [corpus.tokenizer.end_id, *corpus.sources[0].open("validation")[:]]
    assert 1 <= len(batch) <= 4 and batch.shape[1] == min(64, len(split) - 1)
    np.testing.assert_array_equal(fixed_batch(corpus, config), batch)
    text = bytes(b for b in split if b < 256)
    for row in batch:
        assert bytes(row[row != corpus.tokenizer.end_id].tolist()) in text
