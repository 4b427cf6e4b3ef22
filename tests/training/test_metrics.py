import json
import math

import pytest

from inl_jax.training import metrics


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
