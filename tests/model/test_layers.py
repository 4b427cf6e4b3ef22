import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inl_jax.config import InputError
from inl_jax.config_file import load_config, presets
from inl_jax.model import layers
from inl_jax.model.language_model import abstract_params, apply, param_count


@pytest.mark.parametrize("given", ["float32", "bfloat16", "float64"])
def test_at_least_float32_takes_arrays_and_types(given):
    wanted = "float64" if given == "float64" else "float32"
    with jax.enable_x64(True):
        for x in (given, jnp.dtype(given), jnp.ones(2, given)):
            assert layers.at_least_float32(x) == wanted


def test_compute_dtype_refuses_float64_without_x64(model_config):
    with pytest.raises(InputError, match="JAX_ENABLE_X64"):
        param_count(model_config(param_dtype="float64"))


def test_layer_norm_keeps_its_input_alone_for_the_gradient():
    x, d = jax.ShapeDtypeStruct((9, 64), "float32"), jax.ShapeDtypeStruct((64,), "float32")
    kept = jax.eval_shape(lambda *arrays: jax.vjp(layers.layer_norm, *arrays)[1], x, d, d)
    assert sum(leaf.size for leaf in jax.tree.leaves(kept)) <= x.size + 2 * d.size


def test_rotate_makes_products_depend_on_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))

    def product(i, j):
        at = lambda n: jnp.full((1, 1), n)  # noqa: E731
        return jnp.sum(layers.rotate(q, at(i)) * layers.rotate(k, at(j)))

    np.testing.assert_allclose(product(7, 3), product(107, 103), rtol=1e-3)
    assert abs(product(7, 3) - product(9, 3)) > 1e-3


@pytest.mark.parametrize(
    ("capability", "kernel", "expected"),
    [
        (None, "auto", "xla"),
        (None, "xla", "xla"),
        ((8, 0), "auto", "cudnn"),
        ((8, 0), "cudnn", "cudnn"),
        ((8, 0), "xla", "xla"),
    ],
)
def test_attention_kernel_follows_the_config_and_the_device(
    model_config, monkeypatch, capability, kernel, expected
):
    monkeypatch.setattr(layers, "cuda_capability", lambda: capability)
    config = model_config(attention_kernel=kernel, compute_dtype="bfloat16")
    assert layers.attention_kernel(config) == expected


@pytest.mark.parametrize(
    ("capability", "fields", "named"),
    [
        (None, {"attention_kernel": "cudnn"}, "model.attention_kernel=cudnn: JAX runs on cpu.*xla"),
        (
            (9, 0),
            {"compute_dtype": "float32"},
            "model.compute_dtype=float32.*compute_dtype=bfloat16 or model.attention_kernel=xla",
        ),
        ((9, 0), {"d_model": 24}, "model.num_heads=2 .* width 12: .* multiples of 8 up to 256"),
        ((8, 9), {"d_model": 272}, "width 136: .* multiples of 8 up to 128"),
        ((9, 0), {"d_model": 528}, "width 264: .* multiples of 8 up to 256"),
    ],
)
def test_attention_kernel_refuses_what_cudnn_cannot_do(
    model_config, monkeypatch, capability, fields, named
):
    monkeypatch.setattr(layers, "cuda_capability", lambda: capability)
    config = model_config(**{"context": "attention", "compute_dtype": "bfloat16"} | fields)
    params = abstract_params(config)  # which needs no kernel
    with pytest.raises(InputError, match=named):
        jax.eval_shape(functools.partial(apply, config), params, jnp.zeros((1, 4), int))


@pytest.mark.parametrize("name", presets())
def test_attention_kernel_is_cudnn_for_the_heads_of_every_config(name, monkeypatch):
    monkeypatch.setattr(layers, "cuda_capability", lambda: (8, 0))
    named = load_config(name).model
    config = dataclasses.replace(named, context="attention", compute_dtype="bfloat16")
    assert layers.attention_kernel(config) == "cudnn"


@pytest.mark.skipif(layers.cuda_capability() is None, reason="needs a CUDA device for cuDNN")
def test_attend_by_cudnn_equals_xla_on_a_gpu():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 128, 4, 64), jnp.bfloat16)
    k, v = k[:, :, :2], v[:, :, :2]

    def loss(kernel, q, k, v):
        return jnp.sum(layers.attend(q, k, v, kernel=kernel).astype(jnp.float32) ** 2)

    found, expected = (
        jax.jit(jax.value_and_grad(functools.partial(loss, kernel), (0, 1, 2)))(q, k, v)
        for kernel in ("cudnn", "xla")
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=0.05, atol=0.05),
        found,
        expected,
    )


def test_attend_is_softmax_over_the_past():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 6, 4, 8))
    k, v = k[:, :, :2], v[:, :, :2]  # two key-value heads for four query heads
    found = layers.attend(q, k, v)
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    for i, h in itertools.product(range(6), range(4)):
        weights = np.exp(k[0, : i + 1, h // 2] @ q[0, i, h] / 8**0.5)
        weights /= weights.sum()
        np.testing.assert_allclose(
            found[0, i, h], weights @ v[0, : i + 1, h // 2], rtol=1e-4, atol=1e-5
        )
