import json
import math
import os
import shutil

import pytest

from inl_jax.training.metrics import (
    MetricsLog,
    console_lines,
    latest,
    perplexity,
    read_metrics,
)
from inl_jax.watch.progress import standing


def update(step, loss, **fields):
    """A record of an update."""
    return {
        "step": step,
        "num_steps": 10,
        "loss": loss,
        "perplexity": perplexity(loss),
        "learning_rate": 1e-3,
        "grad_norm": 0.5,
        "seconds_per_step": 0.25,
        "tokens_per_second": 1500.0,
        "input_wait": 0.0,
        "seconds_left": 0.25 * (10 - step),
        "skipped": 0,
    } | fields


def validation(step, loss):
    """A record of an evaluation."""
    return {
        "step": step,
        "num_steps": 10,
        "validation_loss": loss,
        "validation_perplexity": perplexity(loss),
        "validation_bits_per_byte": loss / 3,
        "validation_tokens": 1024,
    }


def write(run_dir, *records, resume_from=None):
    log = MetricsLog(run_dir)
    if resume_from is not None:
        log.resume_from(resume_from)
    for record in records:
        log.write(record)
    log.close()


def test_read_metrics_gives_each_record_once_in_order_and_ignores_a_torn_line(tmp_path):
    assert read_metrics(tmp_path) == []
    write(tmp_path, update(1, 5.0), update(2, 4.0), update(3, 3.5), validation(3, 3.6))
    write(tmp_path, update(2, 4.5), update(3, 3.25), validation(3, 3.3), resume_from=1)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    expected = [update(1, 5.0), update(2, 4.5), update(3, 3.25), validation(3, 3.3)]
    assert read_metrics(tmp_path) == expected
    assert read_metrics(tmp_path, up_to=2) == expected[:2]


def test_read_metrics_drops_the_branch_that_a_resumed_run_abandoned(tmp_path):
    """Records above the step resumed from, also those that the new branch never reaches again."""
    write(tmp_path, update(1, 5.0), update(2, 4.0), validation(2, 4.1), update(7, 3.0))
    write(tmp_path, update(2, 4.2), update(3, 3.9), resume_from=1)
    assert read_metrics(tmp_path) == [update(1, 5.0), update(2, 4.2), update(3, 3.9)]
    kept = (tmp_path / "metrics.jsonl").read_text()
    assert "3.0" in kept  # nothing is lost from the file


@pytest.mark.parametrize(
    "line",
    [
        '{"step": "x", "loss": 2.0}',
        '{"step": 5, "loss": "x"}',
        '{"step": null, "loss": 2.0}',
        '{"resumed_from": null}',
        "[" * 100_000,
        '"loss"',
        '{"step": 5, "dynamics": 3}',
        '{"step": 5, "nothing": 1}',
        "[5]",
        "5",
    ],
)
def test_read_metrics_leaves_out_what_is_no_record(tmp_path, line):
    write(tmp_path, update(1, 5.0))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(line + "\n")
    write(tmp_path, validation(6, math.nan))
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 6]


def test_resume_from_leaves_the_file_alone_if_nothing_is_abandoned(tmp_path):
    write(tmp_path, update(1, 5.0), update(2, 4.0))
    before = (tmp_path / "metrics.jsonl").read_text()
    write(tmp_path, resume_from=2)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_metrics_log_loses_no_record_after_a_torn_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0}\n{"step": 2, "lo')
    write(tmp_path, update(2, 4.0))
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_metrics_log_writes_at_once_what_it_says_and_calls_the_hook(tmp_path, capsys):
    heard = []
    log = MetricsLog(tmp_path, on_record=heard.append)
    log.write(update(1, math.inf))
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    written = update(1, math.inf) | {"loss": None, "perplexity": None}  # JSON has no infinity
    assert json.loads(line, parse_constant=pytest.fail) == written
    assert heard == [update(1, math.inf)]
    log.close()
    shown = capsys.readouterr()  # no control characters outside a terminal
    assert (
        shown.out == "".join(f"{line}\n" for line in console_lines(update(1, math.inf)))
        and shown.err == ""
    )


def test_read_metrics_reads_null_and_older_files_alike(tmp_path):
    """A number that was not finite is null; it was NaN or Infinity once."""
    lines = ['{"step": 1, "loss": NaN, "grad_norm": Infinity}', '{"step": 2, "loss": null}']
    lines += ['{"step": 3, "validation_loss": null}', '{"step": 4, "validation_loss": NaN}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    losses = [record.get("loss", record.get("validation_loss")) for record in records]
    assert all(map(math.isnan, losses))
    found = standing([r | {"basis": "b"} for r in records], basis="b")
    assert found.best_step == 0 and found.waited == 2


def block(path, kind):
    """Makes a file impossible to append to; returns how to undo that."""
    if kind == "directory":
        path.mkdir()
        return path.rmdir
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "full disk":
        path.symlink_to("/dev/full")
    else:
        path.symlink_to(path.parent / "nowhere" / "file")
    return path.unlink


@pytest.mark.parametrize("kind", ["directory", "pipe", "full disk", "dangling link"])
def test_metrics_log_warns_once_and_makes_up_for_what_it_could_not_write(tmp_path, said, kind):
    path = tmp_path / "metrics.jsonl"
    write(tmp_path, update(1, 5.0))
    shutil.move(path, tmp_path / "before")
    unblock = block(path, kind)
    assert read_metrics(tmp_path) == []
    log = MetricsLog(tmp_path)
    log.resume_from(1)
    for step in (2, 3):
        log.write(update(step, 4.0))
    assert sum("WARNING" in line for line in said) == 1 and "training goes on" in "".join(said)
    unblock()
    shutil.move(tmp_path / "before", path)
    log.write(update(4, 4.0))
    log.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert len(path.read_text().splitlines()) == 4
    assert "can be written again; no record is lost" in said[-2]


def test_metrics_log_says_at_the_end_what_it_lacks(tmp_path, said):
    (tmp_path / "metrics.jsonl").mkdir()
    write(tmp_path, update(1, 5.0), update(2, 4.0))
    assert "lacks the last 2 records (Is a directory)" in said[-1]


def test_latest_takes_no_damaged_number():
    records = [{"elapsed": 5.0}, {"elapsed": "x"}, {"elapsed": math.nan}, {"elapsed": None}]
    assert latest(records, "elapsed") == 5.0 and latest(records, "energy_kwh") == 0


def test_console_lines_are_made_from_the_record():
    assert console_lines(update(4, 2.0)) == [
        "update 4/10  loss 2.0000  ppl 7.39  lr 1.00e-03  grad 0.500  250 ms  1.50k tok/s  1s left"
    ]
    (busy,) = console_lines(update(4, 2.0, mfu=0.31, input_wait=0.75, skipped=2))
    assert "MFU 31.0%  75% waiting for data  2 skipped" in busy
    line = "update 4/10  validation loss 3.0000  ppl 20.09  1.0000 bits/byte  (1,024 tokens)"
    assert console_lines(validation(4, 3.0)) == [line]
    judged = {"train_loss": 2.375, "gap": 0.625, "verdict": "watch it", "best": True}
    gap = "gap +0.62 to the mean training loss 2.3750: watch it"
    assert console_lines(validation(4, 3.0) | judged | {"patience_left": 2}) == [
        f"{line}  {gap}  best so far  patience left 2"
    ]
    samples = [{"prompt": "a\n", "greedy": "b", "sampled": "c" * 200}]
    assert console_lines({"step": 4, "num_steps": 10, "samples": samples}) == [
        r"update 4/10  sample, likeliest: 'a\nb'",
        rf"update 4/10  sample, drawn: 'a\n{'c' * 155}...'",
    ]
    for rms_error, shown in (([[0.5], [1.5]], "1.000"), ([[2, 7, 1]], "2.000 -> 1.000")):
        dynamics = {"rms_error": rms_error, "stiffness": [[0.25]]}
        assert console_lines({"step": 4, "num_steps": 10, "dynamics": dynamics}) == [
            f"update 4/10  integrator: rms(x - mu) {shown}, largest dt gate beta 0.250"
        ]


def test_perplexity_does_not_overflow():
    assert perplexity(2.0) == pytest.approx(math.exp(2))
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan))
