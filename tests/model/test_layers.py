import jax
import jax.numpy as jnp
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
