import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inl_jax.config import InputError
from inl_jax.config_file import load_config, presets
from inl_jax.model.language_model import abstract_params, apply
from inl_jax.model.mixers import attention
from inl_jax.model.platform.device import H100, Device, current_device, made_for

CPU, A100, RTX_4090 = Device("cpu"), Device("gpu", (8, 0)), Device("gpu", (8, 9))


def test_rotate_makes_products_depend_on_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))

    def product(i, j):
        at = lambda n: jnp.full((1, 1), n)  # noqa: E731
        return jnp.sum(attention.rotate(q, at(i)) * attention.rotate(k, at(j)))

    np.testing.assert_allclose(product(7, 3), product(107, 103), rtol=1e-3)
    assert abs(product(7, 3) - product(9, 3)) > 1e-3


@pytest.mark.parametrize(
    ("device", "kernel", "expected"),
    [
        (CPU, "auto", "xla"),
        (CPU, "xla", "xla"),
        (A100, "auto", "cudnn"),
        (A100, "cudnn", "cudnn"),
        (A100, "xla", "xla"),
    ],
)
def test_attention_kernel_follows_the_config_and_the_device(model_config, device, kernel, expected):
    config = model_config(attention_kernel=kernel, compute_dtype="bfloat16")
    with made_for(device):
        assert attention.attention_kernel(config) == expected


@pytest.mark.parametrize(
    ("device", "fields", "named"),
    [
        (CPU, {"attention_kernel": "cudnn"}, "model.attention_kernel=cudnn: JAX runs on cpu.*xla"),
        (
            H100,
            {"compute_dtype": "float32"},
            "model.compute_dtype=float32.*compute_dtype=bfloat16 or model.attention_kernel=xla",
        ),
        (H100, {"d_model": 24}, "model.num_heads=2 .* width 12: .* multiples of 8 up to 256"),
        (RTX_4090, {"d_model": 272}, "width 136: .* multiples of 8 up to 128"),
        (H100, {"d_model": 528}, "width 264: .* multiples of 8 up to 256"),
    ],
)
def test_attention_kernel_refuses_what_cudnn_cannot_do(model_config, device, fields, named):
    config = model_config(**{"context": "attention", "compute_dtype": "bfloat16"} | fields)
    params = abstract_params(config)  # which needs no kernel
    with made_for(device), pytest.raises(InputError, match=named):
        jax.eval_shape(functools.partial(apply, config), params, jnp.zeros((1, 4), int))


@pytest.mark.parametrize("name", presets())
def test_attention_kernel_is_cudnn_for_the_heads_of_every_config(name):
    named = load_config(name).model
    config = dataclasses.replace(named, context="attention", compute_dtype="bfloat16")
    with made_for(A100):
        assert attention.attention_kernel(config) == "cudnn"


@pytest.mark.skipif(current_device().capability is None, reason="needs a CUDA device for cuDNN")
def test_attend_by_cudnn_equals_xla_on_a_gpu():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 128, 4, 64), jnp.bfloat16)
    k, v = k[:, :, :2], v[:, :, :2]

    def loss(kernel, q, k, v):
        return jnp.sum(attention.attend(q, k, v, kernel=kernel).astype(jnp.float32) ** 2)

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
    found = attention.attend(q, k, v)
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    for i, h in itertools.product(range(6), range(4)):
        weights = np.exp(k[0, : i + 1, h // 2] @ q[0, i, h] / 8**0.5)
        weights /= weights.sum()
        np.testing.assert_allclose(
            found[0, i, h], weights @ v[0, : i + 1, h // 2], rtol=1e-4, atol=1e-5
        )
