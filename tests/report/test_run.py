import json

import numpy as np
import pytest

from inl_jax.config import InputError
from inl_jax.report.run import read_runs


def write_run(path, step=1):
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text(json.dumps({"step": step, "loss": 2.0}) + "\n")
    return str(path)


def test_read_runs_names_a_run_by_its_directory_and_by_its_path_if_two_share_that(tmp_path):
    paths = [write_run(tmp_path / name) for name in ("a/run", "b/run", "other")]
    assert [run.name for run in read_runs(paths)] == [*paths[:2], "other"]
    assert [run.name for run in read_runs(paths[1:])] == ["run", "other"]


def test_read_runs_says_what_is_no_run(tmp_path):
    with pytest.raises(InputError, match="no run with records .* name the run_dir"):
        read_runs([str(tmp_path)])
    path = write_run(tmp_path / "a")
    with pytest.raises(InputError, match="named twice"):
        read_runs([path, path + "/"])


def test_positions_are_interpolated_where_they_were_recorded_from_the_beginning(make_run):
    run = make_run(updates=20)
    assert run.positions(np.array([5, 10])).keys() == {"updates", "tokens"}  # of an old run
    np.testing.assert_allclose(run.positions(np.array([5, 10]))["tokens"], [5 * 512, 10 * 512])
    for record in run.records:
        record["tokens"], record["elapsed"] = 1000 * record["step"], 7200 * record["step"]
    del run.records[9]["tokens"], run.records[9]["elapsed"]
    found = run.positions(np.array([5, 10]))
    np.testing.assert_allclose(found["tokens"], [5000, 10000])
    np.testing.assert_allclose(found["hours"], [10, 20])
    for record in run.records[:8]:  # the first starts did not record the time
        del record["elapsed"]
    assert "hours" not in run.positions(np.array([5, 10]))


def test_curve_takes_null_as_not_a_number(make_run):
    run = make_run(updates=1, records=[{"step": 2, "loss": None}])
    steps, values = run.curve("loss")
    assert list(steps) == [1, 2] and values[0] == 8.0 and np.isnan(values[1])
    assert run.latest("loss") == 8.0


def test_read_runs_finds_a_run_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    assert [run.run_dir for run in read_runs(["~/run"])] == [tmp_path / "run"]
