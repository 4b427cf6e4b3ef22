import json
import math

import pytest

from inl_jax.config_file import to_json
from inl_jax.report import run_report
from inl_jax.report.run import read_runs
from inl_jax.watch.cleaning import clean_records, read_files
from inl_jax.watch.integrator_probe import QUANTITIES

START = {
    "time": "2026-01-01T00:00:00+00:00",
    "host": "here",
    "command": "inl train",
    "devices": {"kind": "cpu", "count": 1},
}
JUNK = [None, "x", [], {"a": 1}, True, -1, 10**400, math.nan, 1e308]


def dynamics(layers=1):
    return {name: [[0.5, 0.25]] * layers for name in QUANTITIES}


@pytest.fixture
def whole(evaluation):
    """Records of every kind with every field that a page reads."""
    now = {"num_steps": 20, "time": 1.8e9, "elapsed": 60.0, "tokens": 512, "epoch": 0.1}
    update = {"loss": 3.0, "tokens_per_second": 10.0, "samples_seen": 4, "skipped": 0, "mfu": 0.1}
    over = {"gap": 0.1, "verdict": "good", "best": True, "basis": "b", "train_loss": 3.0}
    sample = {"prompt": "a", "greedy": "b", "sampled": "c"}
    return [
        {"step": 1, **now, **update, "peak_memory": 2**30, "energy_kwh": 0.5},
        {"step": 2, **now, **update},
        evaluation(2, 3.0, **now, **over, sources={"a": {"loss": 3.0}, "b": {"loss": None}}),
        {"step": 2, **now, "dynamics": dynamics()},
        {"step": 2, **now, "samples": [sample]},
        {"step": 3, **now, "dynamics": dynamics()},
    ]


@pytest.fixture
def page_of(monkeypatch, tmp_path, train_config):
    """The page about a run with these records and files."""
    monkeypatch.setattr(run_report, "page", lambda title, body: body)

    def page_of(records, **files):
        whole = {"config": to_json(train_config()), "env": json.dumps({"starts": [START]})}
        for name, text in (whole | files).items():
            (tmp_path / f"{name}.json").write_text(text)
        (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
        return run_report.report(read_runs([str(tmp_path)]))

    return page_of


def test_clean_records_leaves_whole_ones_as_they_are(whole):
    assert clean_records(whole) == (whole, 0)


@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: str(junk)[:8])
def test_a_page_is_made_whatever_a_field_of_a_record_holds(page_of, whole, junk):
    for of in range(len(whole)):
        records = [dict(record) for record in whole]
        for key in whole[of]:
            if key != "step":
                records[of][key] = junk
        assert "<h1>" in page_of(records)
    keys = {key for record in whole for key in record}
    alone = [{"step": at, "loss": 2.0, key: junk} for at, key in enumerate(sorted(keys), start=4)]
    assert "<h1>" in page_of([*whole, *alone])


@pytest.mark.parametrize("key", ["num_steps", "elapsed", "validation_perplexity"])
def test_a_page_is_made_without_a_field(page_of, whole, key):
    records = [{k: v for k, v in record.items() if k != key} for record in whole]
    assert "<h1>" in page_of(records) and "damaged" not in page_of(records)


@pytest.mark.parametrize("record", [{"step": 1, "loss": 2.0}, {"step": 1, "samples": []}], ids=str)
def test_a_page_is_made_of_one_bare_record(page_of, record):
    assert "<h1>" in page_of([record])


def test_a_page_says_how_many_records_were_damaged_and_which_files(page_of, whole):
    whole[0]["mfu"], whole[1]["elapsed"] = "x", [1]
    whole[2]["perplexity"] = math.nan  # is no damage
    text = page_of(whole, best='{"step": "x"}')
    assert "damaged and left out: best.json, 2 records" in text
    assert "damaged" not in page_of(whole[3:], best='{"step": 2}')


def test_dynamics_of_another_shape_than_the_last_are_left_out(whole):
    whole[3]["dynamics"] = dynamics(layers=2)
    records, damaged = clean_records(whole)
    assert damaged == 1 and ["dynamics" in record for record in records].count(True) == 1


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config", '{"data": null}'),
        ("config", '{"data": "x", "model": "y"}'),
        ("config", '{"data": {"seq_len": "x"}}'),
        ("env", '{"starts": {"a": 1}}'),
        ("env", '{"starts": [{}]}'),
        ("env", json.dumps({"starts": [START | {"time": 5}]})),
        ("env", json.dumps({"starts": [START, START | {"devices": None}]})),
        ("best", '{"step": "x"}'),
        ("best", '{"validation_loss": 1}'),
    ],
)
def test_a_file_that_cannot_be_used_is_left_out(page_of, tmp_path, whole, file, text):
    assert f"damaged and left out: {file}.json" in page_of(whole, **{file: text})
    contents, damaged = read_files(tmp_path)
    assert damaged == [f"{file}.json"] and {} in contents
