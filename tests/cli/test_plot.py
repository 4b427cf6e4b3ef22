import json
import sys

import pytest


@pytest.fixture
def run_dir(tmp_path):
    """A run directory with the records of a training."""
    records = [{"step": i, "loss": 8 / i} for i in range(1, 20)]
    records += [{"step": i, "validation_loss": 9 / i} for i in (5, 10, 15)]
    (tmp_path / "run").mkdir()
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "run/metrics.jsonl").write_text(lines)
    return tmp_path / "run"


def test_plot_draws_the_loss_of_a_run(run_dir, inl, tmp_path):
    code, out, err = inl("plot", run_dir)
    assert code == 0 and out == f"loss picture: {run_dir / 'loss.png'}\n", err
    assert (run_dir / "loss.png").stat().st_size > 5000
    assert inl("plot", run_dir, tmp_path / "here.png")[0] == 0
    assert (tmp_path / "here.png").exists()


def test_plot_names_a_run_without_records(inl):
    code, _, err = inl("plot", "nowhere")
    assert code == 2 and err.startswith("error: nowhere: no metrics.jsonl")


def test_plot_without_matplotlib_gives_the_command_that_installs_it(inl, monkeypatch, run_dir):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = inl("plot", run_dir)
    assert code == 2 and err == "error: inl plot needs matplotlib: pip install 'inl_jax[plot]'\n"


def test_plot_names_what_is_no_picture(inl, run_dir, tmp_path):
    """Two runs are one too many, and a name without a suffix would get another name."""
    for out in (run_dir, tmp_path / "loss"):
        code, _, err = inl("plot", run_dir, out)
        assert code == 2 and f"{out} is no picture" in err
