import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from inl_jax.config_file import load_config
from inl_jax.model import language_model as model
from inl_jax.parallel.sharding import make_mesh
from inl_jax.planning.cost import flops_per_token, utilization


def dot_flops(jaxpr) -> int:
    """FLOPs of every `dot_general` in a jaxpr: 2 per multiply-add, times the length of its scan."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            inner = math.prod(left[axis] for axis in contracted)
            total += 2 * math.prod(equation.outvars[0].aval.shape) * inner
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inner in jaxprs_in_params(equation.params):
            total += times * dot_flops(inner)
    return total


@pytest.mark.parametrize(
    "context, every, num_iterations",
    [
        ("mean", 0, 3),
        ("decay", 0, 0),
        ("decay", 0, 3),
        ("decay", 2, 0),
        ("gated", 0, 3),
        ("gated", 2, 3),
        ("attention", 0, 0),
        ("attention", 0, 3),
    ],
)
@pytest.mark.parametrize("remat", ["none", "block"])
def test_flops_per_token_counts_the_products_of_the_forward_pass(
    model_config, context, every, num_iterations, remat
):
    c = model_config(
        context=context, attention_every=every, num_iterations=num_iterations, remat=remat
    )
    B, S = 2, 24
    forward = functools.partial(model.apply, c)
    ids = jax.ShapeDtypeStruct((B, S), jnp.int32)
    traced = dot_flops(jax.make_jaxpr(forward)(model.abstract_params(c), ids).jaxpr)
    # XLA's attention computes the whole square of scores, but a token needs (S + 1) / 2 of a row.
    with_scores = (c.mixers * c.num_layers)[: c.num_layers].count("attention")
    traced -= B * S * with_scores * 2 * 2 * c.d_model * (S - 1) // 2
    assert B * S * flops_per_token(c, S) == traced


def test_flops_per_token_of_the_3b():
    assert 3 * flops_per_token(load_config("3b").model, 4096) == pytest.approx(15.3e9, rel=0.01)


def test_utilization_is_the_share_of_the_peak_of_all_devices(train_config):
    config = train_config()
    kind = SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")
    mesh = SimpleNamespace(devices=np.array([[kind], [kind]]), size=2)
    most = 2 * 989e12 / (3 * flops_per_token(config.model, config.data.seq_len))  # tokens/s
    assert utilization(config, mesh, 0.4 * most) == {"mfu": pytest.approx(0.4)}


def test_utilization_is_left_out_if_the_peak_is_unknown(train_config):
    config = train_config()
    assert utilization(config, make_mesh(config.mesh), 1e6) == {}
    kind = SimpleNamespace(device_kind="NVIDIA GeForce RTX 4060 Ti")
    mesh = SimpleNamespace(devices=np.array([kind]), size=1)
    assert utilization(config, mesh, 1e6) == {}
