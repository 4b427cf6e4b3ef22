import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_same
from lively import published_params

import inl_jax
from inl_jax.config import InputError
from inl_jax.interop import published as interop
from inl_jax.model.language_model import hidden_states
from inl_jax.model.losses import token_losses

GOLDEN = np.load(Path(__file__).with_name("published_inl_tiny.npz"))
WEIGHTS = {k.removeprefix("state_dict/"): GOLDEN[k] for k in GOLDEN if k.startswith("state_dict/")}
IDS = GOLDEN["input_ids"]


def golden_config(**fields):
    return interop.config_from_torch(
        WEIGHTS,
        num_iterations=int(GOLDEN["num_iterations"]),
        excitation_amplitude=float(GOLDEN["excitation_amplitude"]),
        dt=float(GOLDEN["dt"]),
        **fields,
    )


# Measured: 1.4e-15 and 5e-7 for logits.
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [("float64", 1e-12), pytest.param("float32", 1e-5, marks=pytest.mark.slow)],
)
def test_published_logits_loss_and_gradients(dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        config = golden_config(param_dtype=dtype)
        params = interop.params_from_torch(WEIGHTS, config)
        found = jax.jit(inl_jax.apply, static_argnums=0)(config, params, IDS)
        assert found.dtype == dtype
        np.testing.assert_allclose(found, GOLDEN["logits"], atol=tolerance)

        def loss(params):
            hidden = hidden_states(config, params, IDS[:, :-1])
            return token_losses(params, hidden, jnp.asarray(IDS[:, 1:])).mean()

        value, grads = jax.jit(jax.value_and_grad(loss))(params)
        np.testing.assert_allclose(value, GOLDEN["loss"], atol=tolerance)
        compared = compare_gradients(grads, config, tolerance)
    in_golden = {k.removeprefix("grad/") for k in GOLDEN if k.startswith("grad/")}
    # gamma stands still there: its gradient is phi's times the counter.
    assert compared == in_golden


def compare_gradients(grads, config, tolerance) -> set[str]:
    """Gradients map as weights do, except that scaled weights scale theirs the other way."""
    root_d = config.d_model**0.5
    grads = jax.tree.map(np.asarray, grads)
    grads["embedding"] = grads["embedding"] / config.d_model  # d/d(E sqrt(D)), exported times it
    grads["final_norm_scale"] = grads["final_norm_scale"] * root_d**2
    grads["final_norm_bias"] = grads["final_norm_bias"] * root_d**2
    exported = interop.published_layout(grads, config)
    step = int(WEIGHTS["layers.0.inl.global_step"])
    names = set()
    for key in GOLDEN:
        if not key.startswith("grad/"):
            continue
        name = key.removeprefix("grad/")
        found = exported[name]
        if name.endswith("excitation_gamma"):
            found = step * exported[name.replace("gamma", "phi")]
        np.testing.assert_allclose(found, GOLDEN[key], atol=tolerance, err_msg=name)
        names.add(name)
    return names


def test_sizes_are_read_off_the_weights():
    config = golden_config()
    assert (config.vocab_size, config.d_model, config.num_layers, config.d_ff) == (29, 16, 2, 32)
    assert (config.controller_width, config.max_seq_len, config.context) == (64, 32, "mean")
    assert config.kappa == float("inf")


def test_export_is_the_inverse():
    with jax.enable_x64(True):
        config = golden_config(param_dtype="float64")
        params = interop.params_from_torch(WEIGHTS, config)
        exported = interop.params_to_torch(params, config)
        assert set(exported) == set(WEIGHTS)
        for name, array in WEIGHTS.items():
            if not name.endswith(("gamma", "phi", "global_step")):  # folded into phi on import
                np.testing.assert_allclose(exported[name], array, rtol=1e-14, err_msg=name)
        again = interop.params_from_torch(exported, config)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-14), params, again)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("layers.1.inl.mu"), "layers.1.inl.mu"),
        (lambda w: w.update(extra=np.zeros(1)), "extra"),
        (lambda w: w.update({0: np.zeros(1)}), "no place for: 0"),
        (lambda w: w.update({"final_norm.bias": np.zeros(3)}), r"final_norm.bias has shape \(3,\)"),
        (lambda w: w.update({"layers.1.inl.mlp_beta.0.weight": np.zeros(3)}), "mlp_beta.0.weight"),
        (lambda w: w.update({"layers.1.inl.mu": np.full(16, np.nan)}), "inl.mu holds NaN"),
        (
            lambda w: w.update({"layers.1.inl.mu": np.ones(16, complex)}),
            "inl.mu is of type complex",
        ),
        (lambda w: w.update({"layers.1.inl.mu": np.ones(16, np.int8)}), "inl.mu is of type int8"),
        (lambda w: w.update({"layers.1.inl.mu": "text"}), "inl.mu is of type <U4"),
        (lambda w: w.update({"lm_head.weight": np.zeros((29, 16))}), "tied"),
        (lambda w: w.update({"pos_encoding.pe": np.zeros((1, 32, 16))}), "sinusoid"),
        (lambda w: w.update({"pos_encoding.pe": np.zeros(16)}), "pos_encoding.pe has shape"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, message):
    weights = dict(WEIGHTS)
    change(weights)
    with pytest.raises(InputError, match=message):
        interop.params_from_torch(weights, golden_config())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("token_embedding.weight", np.zeros(3), r"shape \(3,\): it must be a matrix"),
        ("token_embedding.weight", np.zeros((0, 16)), "vocab_size=0"),
        ("layers.0.ff.0.weight", np.zeros(()), "it must be a matrix"),
        ("layers.0.inl.mlp_alpha.0.weight", np.zeros((1, 2, 3)), "it must be a matrix"),
        ("pos_encoding.pe", np.zeros((4, 8)), r"it must be \[positions, 16\]"),
    ],
)
def test_sizes_that_cannot_be_read_off_are_named(name, value, message):
    with pytest.raises(InputError, match=message):
        interop.config_from_torch(WEIGHTS | {name: value}, num_iterations=3)


def test_width_with_a_rounded_root_comes_back_to_the_last_bit_but_one(model_config):
    config = model_config(context="mean", kappa=math.inf, d_model=48)
    params = published_params(config)
    again = interop.params_from_torch(interop.params_to_torch(params, config), config)
    for name in ("embedding", "final_norm_scale", "final_norm_bias"):
        np.testing.assert_array_max_ulp(again.pop(name), params.pop(name), maxulp=1)
    assert_same(again, params)


def test_exports_of_bfloat16_are_float32_arrays_that_torch_takes():
    torch = pytest.importorskip("torch", reason="the torch extra is not installed")
    config = golden_config(param_dtype="bfloat16")
    params = interop.params_from_torch(WEIGHTS, config)
    exported = interop.params_to_torch(params, config)
    tensors = {name: torch.from_numpy(value) for name, value in exported.items()}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32, torch.int64}
    again = interop.params_from_torch(exported, config)
    assert_same(params, again)


def test_other_contexts_are_refused(model_config):
    with pytest.raises(InputError, match="mean"):
        interop.params_from_torch(WEIGHTS, model_config(context="decay"))


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"context": "decay"}, "model.context=decay: in the published model it is mean"),
        ({"context": "gated"}, "model.context=gated: in the published model it is mean"),
        (
            {"context": "decay", "attention_every": 2},
            "model.attention_every=2: in the published model it is 0",
        ),
        ({"kappa": 1.0}, "model.kappa=1.0: in the published model it is inf"),
        ({"dt": 0.2}, "model.dt=0.2: in the published model it is 0.1"),
        ({"excitation_amplitude": 0.0}, "model.excitation_amplitude=0.0: .* it is 0.03"),
        ({}, "integrator.gamma is up to 0.5: the published harmonic stands still"),
    ],
)
def test_what_the_published_model_cannot_compute_is_refused(fields, named):
    config = golden_config()
    params = interop.params_from_torch(WEIGHTS, config)
    if not fields:
        integrator = params["blocks"]["integrator"]
        integrator["gamma"] = integrator["gamma"].at[1, 3].set(-0.5)
    config = dataclasses.replace(config, **fields)
    with pytest.raises(InputError, match=f"{named}.*; export a directory for transformers"):
        interop.params_to_torch(params, config)
