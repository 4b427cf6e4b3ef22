import jax
import numpy as np
import pytest
from conftest import assert_same
from exported_dir import from_named, to_named
from lively import lively_params

from inl_jax.interop.named_weights import named_leaves, weights_of
from inl_jax.model.language_model import abstract_params, param_count


@pytest.mark.parametrize(
    "fields",
    [
        {"context": "mean"},
        {"context": "decay", "num_iterations": 0},
        {"context": "decay", "param_dtype": "bfloat16"},
        {"context": "attention"},
        {"context": "gated", "attention_every": 2, "num_layers": 4},
    ],
    ids=[
        *["mean", "decay without integrator", "decay in bfloat16", "attention"],
        "gated and attention",
    ],
)
def test_named_weights_come_back_bit_for_bit(model_config, fields):
    config = model_config(**fields)
    params = lively_params(config)
    named = to_named(params, config)
    weights = weights_of(config)
    assert {weight.name: weight.exported_shape for weight in weights} == {
        name: array.shape for name, array in named.items()
    }
    assert len(named) == len(weights)
    assert sum(array.size for array in named.values()) == param_count(config)
    assert all(array.flags.c_contiguous for array in named.values())
    assert_same(from_named(named.__getitem__, config), jax.tree.map(np.asarray, params))


def test_layers_with_different_contexts_keep_their_order(model_config):
    config = model_config(context="gated", attention_every=2, num_layers=4)
    params = lively_params(config)
    named = to_named(params, config)
    for layer in range(4):
        ours = params["blocks"][f"layer_{layer % 2}"]["norm2_scale"][layer // 2]
        assert_same(named[f"model.layers.{layer}.norm2.weight"], np.asarray(ours))
        kernel = "q_proj" if layer % 2 else "decay_proj"
        assert f"model.layers.{layer}.context.{kernel}.weight" in named


def test_leaves_are_made_one_at_a_time(model_config):
    config, asked = model_config(context="decay"), []
    shapes = {weight.name: weight.exported_shape for weight in weights_of(config)}

    def get(name):
        asked.append(name)
        return np.zeros(shapes[name], np.float32)

    leaves = named_leaves(get, config)
    next(leaves)
    assert len(set(name.replace("layers.1", "layers.0") for name in asked)) == 1
    assert len(list(leaves)) + 1 == len(jax.tree.leaves(abstract_params(config)))
    assert sorted(asked) == sorted(shapes), "each is read once"
