import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from inl_jax.config import ModelConfig
from inl_jax.model import language_model as model
from inl_jax.planning.cost import flops_per_token


def dot_flops(jaxpr) -> int:
    """Two per multiply-add of every `dot_general` in a jaxpr, scans by their length."""
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
    "context, num_iterations",
    [("mean", 3), ("decay", 0), ("decay", 3), ("attention", 0), ("attention", 3)],
)
@pytest.mark.parametrize("remat", ["none", "block"])
def test_flops_per_token_counts_the_products_of_the_forward_pass(
    model_config, context, num_iterations, remat
):
    c = model_config(context=context, num_iterations=num_iterations, remat=remat)
    B, S = 2, 24
    forward = functools.partial(model.apply, c)
    ids = jax.ShapeDtypeStruct((B, S), jnp.int32)
    traced = dot_flops(jax.make_jaxpr(forward)(model.abstract_params(c), ids).jaxpr)
    # One difference is known: XLA's attention computes the whole square, of which (S + 1) / 2 is
    # needed.
    if context == "attention":
        whole = c.num_layers * 2 * 2 * S * c.d_model
        traced -= B * S * whole * (S - 1) // (2 * S)
    assert B * S * flops_per_token(c, S) == traced


def test_flops_per_token_of_the_3b():
    config = ModelConfig(
        d_model=2048, num_layers=40, num_iterations=15, d_ff=8192, max_seq_len=4096
    )
    assert 3 * flops_per_token(config, 4096) == pytest.approx(15.3e9, rel=0.01)
