import json
import sys

import pytest


@pytest.fixture
def run_dir(tmp_path):
    """A run directory with one record, as an old version wrote it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text(
        json.dumps({"step": 1, "num_steps": 2, "loss": 3.0}) + "\n"
    )
    return tmp_path / "run"


def test_report_writes_a_page_and_says_where(run_dir, inl, tmp_path, monkeypatch):
    pytest.importorskip("plotly")
    monkeypatch.chdir(tmp_path)
    code, out, err = inl("report", run_dir)
    assert code == 0 and out == f"report: {run_dir / 'report.html'}\n", err
    assert "Training loss" in (run_dir / "report.html").read_text()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/metrics.jsonl").write_bytes((run_dir / "metrics.jsonl").read_bytes())
    assert inl("report", run_dir, "other")[:2] == (0, "report: report.html\n")
    assert "2 runs compared" in (tmp_path / "report.html").read_text()


def test_report_names_what_is_no_run_and_what_is_no_page(run_dir, inl):
    code, _, err = inl("report", run_dir, "nowhere")
    assert code == 2 and err.startswith("error: nowhere: no run with records")
    for out in (run_dir, run_dir / "page.png"):
        code, _, err = inl("report", run_dir, "--out", out)
        assert code == 2 and f"--out {out}: is no page" in err
    code, _, err = inl("report", run_dir, "--out", run_dir / "no/where.html")
    assert code == 2 and "No such file or directory; name another file" in err


def test_report_without_plotly_gives_the_command_that_installs_it(inl, monkeypatch, run_dir):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    code, _, err = inl("report", run_dir)
    assert code == 2 and err.endswith("pip install 'inl_jax[report]'\n")
