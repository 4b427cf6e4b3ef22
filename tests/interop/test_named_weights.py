import jax
import numpy as np
import pytest
from conftest import assert_same

from inl_jax.interop.named_weights import from_named, to_named, weights_of
from inl_jax.model.language_model import init_params, param_count


@pytest.mark.parametrize(
    "fields",
    [
        {"context": "mean"},
        {"context": "decay", "num_iterations": 0},
        {"context": "decay", "param_dtype": "bfloat16"},
        {"context": "attention"},
    ],
    ids=["mean", "decay without integrator", "decay in bfloat16", "attention"],
)
def test_named_weights_come_back_bit_for_bit(model_config, fields):
    config = model_config(**fields)
    params = init_params(config, jax.random.key(0))
    named = to_named(params, config)
    weights = weights_of(config)
    assert {weight.name: weight.exported_shape for weight in weights} == {
        name: array.shape for name, array in named.items()
    }
    assert len(named) == len(weights)
    assert sum(array.size for array in named.values()) == param_count(config)
    assert all(array.flags.c_contiguous for array in named.values())
    assert_same(from_named(named.__getitem__, config), jax.tree.map(np.asarray, params))
