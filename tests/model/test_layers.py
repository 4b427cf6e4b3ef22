import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inl_jax.config import InputError
from inl_jax.model import layers
from inl_jax.model.language_model import param_count


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


def plain_feed_forward(x, up_kernel, up_bias, down_kernel, down_bias):
    return jax.nn.gelu(x @ up_kernel + up_bias, approximate=False) @ down_kernel + down_bias


FEED_FORWARD = ((2, 9, 8), (8, 32), (32,), (32, 8), (8,))


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 1e-5)])
def test_feed_forward_and_its_gradient_follow_the_definition(dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        keys = jax.random.split(jax.random.key(0), 6)
        *arrays, dy = (
            jax.random.normal(key, shape, dtype)
            for key, shape in zip(keys, (*FEED_FORWARD, FEED_FORWARD[0]), strict=True)
        )
        arrays[0] = 4 * arrays[0]  # far into both tails

        def both(function):
            y, gradient = jax.vjp(function, *arrays)
            return y, *gradient(dy)

        pairs = zip(both(layers.feed_forward), both(plain_feed_forward), strict=True)
        for ours, theirs in pairs:
            assert ours.dtype == theirs.dtype
            np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=10 * tolerance)


def test_feed_forward_keeps_one_array_of_its_hidden_width_for_the_gradient():
    shapes = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in FEED_FORWARD]
    kept = jax.eval_shape(lambda *arrays: jax.vjp(layers.feed_forward, *arrays)[1], *shapes)
    assert [leaf.shape for leaf in jax.tree.leaves(kept)].count((2, 9, 32)) == 1


@pytest.mark.slow
def test_feed_forward_writes_no_value_of_phi_for_its_gradient_on_a_cpu():
    def gradient(dy, *arrays):
        return jax.vjp(layers.feed_forward, *arrays)[1](dy)

    wider = ((2, 64, 32), (2, 64, 32), (32, 128), (128,), (128, 32), (32,))
    shapes = [jax.ShapeDtypeStruct(shape, "float32") for shape in wider]
    program = jax.jit(gradient).lower(*shapes).compile().as_text()
    assert " erf(" in program
    assert not re.search(r"ROOT \S+ = \S+ erf\(", program)
