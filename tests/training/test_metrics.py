import functools
import json
import math

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from inl_jax.config import ModelConfig
from inl_jax.model import language_model as model
from inl_jax.training import metrics


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
def test_flops_are_those_of_the_products_in_the_forward_pass(
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
    assert B * S * metrics.flops_per_token(c, S) == traced


def test_flops_of_the_3b():
    config = ModelConfig(
        d_model=2048, num_layers=40, num_iterations=15, d_ff=8192, max_seq_len=4096
    )
    assert 3 * metrics.flops_per_token(config, 4096) == pytest.approx(15.3e9, rel=0.01)


def test_records_are_read_in_order_once_each_and_without_a_torn_line(tmp_path):
    assert metrics.read_metrics(tmp_path) == []
    log = metrics.MetricsLog(tmp_path)
    for step, loss in [(1, 5.0), (2, 4.0), (3, 3.5)]:
        log.write({"step": step, "loss": loss}, "")
    log.write({"step": 3, "validation_loss": 3.6}, "")
    log.close()
    log = metrics.MetricsLog(tmp_path)  # resumed from 1: 2 and 3 are written again
    for step, loss in [(2, 4.5), (3, 3.25)]:
        log.write({"step": step, "loss": loss}, "")
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    expected = [
        {"step": 1, "loss": 5.0},
        {"step": 2, "loss": 4.5},
        {"step": 3, "loss": 3.25},
        {"step": 3, "validation_loss": 3.6},
    ]
    assert metrics.read_metrics(tmp_path) == expected
    assert metrics.read_metrics(tmp_path, up_to=2) == expected[:2]


def test_a_run_resumed_after_a_torn_line_loses_no_record(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0}\n{"step": 2, "lo')
    log = metrics.MetricsLog(tmp_path)
    log.write({"step": 2, "loss": 4.0}, "")
    log.close()
    steps = [record["step"] for record in metrics.read_metrics(tmp_path)]
    assert steps == [1, 2]


def test_records_are_on_disk_at_once_and_hold_what_is_not_finite(tmp_path, capsys):
    log = metrics.MetricsLog(tmp_path)
    log.write({"step": 1, "loss": math.inf}, "the line")
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 1, "loss": math.inf}
    log.close()
    assert capsys.readouterr().out == "the line\n"  # no control characters outside a terminal


def test_perplexity_does_not_overflow():
    assert metrics.perplexity(2.0) == pytest.approx(math.exp(2))
    assert metrics.perplexity(1e4) == math.inf
    assert math.isnan(metrics.perplexity(math.nan))


@pytest.mark.parametrize(
    "seconds, shown",
    [
        (0, "0s"),
        (59.9, "59s"),
        (60, "1m 00s"),
        (306, "5m 06s"),
        (3600, "1h 00m"),
        (11_045, "3h 04m"),
        (86_399, "23h 59m"),
        (93_700, "1d 02h"),
    ],
)
def test_durations_for_people(seconds, shown):
    assert metrics.duration(seconds) == shown


@pytest.mark.parametrize(
    "number, shown",
    [(999, "999"), (1000, "1.00k"), (43_087_872, "43.09M"), (1_698_414_592, "1.70B")],
)
def test_counts_for_people(number, shown):
    assert metrics.count(number) == shown
