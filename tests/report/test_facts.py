import math

import pytest

from inl_jax.config_file import to_json
from inl_jax.report.facts import UNKNOWN, architecture, best_evaluation, bytes_per_token, facts


def values(run):
    return {fact.label: fact.value for fact in facts(run)}


def test_facts_of_an_old_run_say_what_is_not_known(make_run):
    found = values(make_run())
    unknown = {label for label, value in found.items() if value == UNKNOWN}
    assert unknown == found.keys() - {"Trained tokens", "Speed"}
    assert found["Trained tokens"] == "10.24k"  # 20 updates of 4 sequences of 128


def test_facts_are_of_the_last_evaluation_and_of_the_best(make_run, evaluation):
    records = [evaluation(5, math.nan), evaluation(10, 4.0), evaluation(20, 5.0, gap=1.25)]
    records[-1]["verdict"] = "over-fitting"
    found = {fact.label: fact for fact in facts(make_run(records=records, best={"step": 10}))}
    assert found["Validation loss"].value == "5.0000" and found["Best update"].value == "10"
    assert found["Best update"].more == "loss 4.0000; its checkpoint is kept"
    assert found["Over-fitting"].value == "over-fitting" and found["Over-fitting"].tone == "bad"
    assert found["Bits per byte"].more == "4.00 bytes per token"


@pytest.mark.parametrize("left, said", [(0, True), (1, False)])
def test_facts_say_that_a_run_stopped_early(make_run, evaluation, left, said):
    run = make_run(records=[evaluation(5, 2.0), evaluation(10, 3.0, patience_left=left)])
    (tokens,) = (fact for fact in facts(run) if fact.label == "Trained tokens")
    assert ("stopped early" in tokens.more) == said


def test_an_evaluation_without_a_finite_loss_is_never_the_best(make_run, evaluation):
    run = make_run(records=[evaluation(5, math.nan), evaluation(10, math.inf)])
    assert best_evaluation(run) is None and bytes_per_token(run) is None
    assert values(run)["Validation loss"] == "not finite"


def test_the_best_evaluation_is_one_of_the_latest_validation_text(make_run, evaluation):
    records = [evaluation(5, 1.0, basis="old"), evaluation(10, 4.0, basis="new")]
    assert best_evaluation(make_run(records=records)) is records[1]


@pytest.mark.parametrize(
    ("kinds", "price"),
    [
        (["NVIDIA H100 80GB HBM3"], "107.60 USD"),  # 20 hours of 2 at 2.69
        (["NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"], "83.80 USD"),  # 10 h each
        (["cpu"], UNKNOWN),
        ([], UNKNOWN),
    ],
)
def test_price_is_the_rent_of_the_devices_of_every_start(make_run, kinds, price):
    starts = [
        {"time": f"2026-01-01T{10 * i:02}:00:00+00:00", "devices": {"kind": kind, "count": 2}}
        for i, kind in enumerate(kinds)
    ]
    run = make_run(environment={"starts": starts})
    for record in run.records:
        record["elapsed"] = 3600 * record["step"]
        record["time"] = 1767225600 + 3600 * record["step"] - 1  # 2026-01-01 00:00 UTC
    assert values(run)["Price"] == price


def test_architecture_is_read_from_the_config_and_unknown_without_one(
    make_run, train_config, tmp_path
):
    (tmp_path / "config.json").write_text(to_json(train_config()))
    found = architecture(make_run()._replace(run_dir=tmp_path))
    assert found == "12,128 parameters (12.13k), decay context"
    assert architecture(make_run("nowhere")) == "number of parameters not known"
