import sys
from pathlib import Path

import pytest

from inl_jax.cli.inspect import table
from inl_jax.config_file import to_json
from inl_jax.watch.integrator_probe import QUANTITIES


def test_inspect_prints_a_table_and_writes_a_page(trained, inl, tmp_path):
    pytest.importorskip("plotly")
    page = tmp_path / "page.html"
    code, out, err = inl("inspect", trained[1], "--prompt", "the fox", "é\n", "--out", page)
    assert code == 0, err
    assert out.startswith("'the fox': 7 tokens\nlayer  rms(x - mu)  ")
    assert out.endswith(f"\npage: {page}\n") and "\n'é\\n': 3 tokens\n" in out
    rows = [line.split() for line in out.splitlines() if line.split()[:1] in (["1"], ["2"])]
    assert len(rows) == 4 and all(len(row) == 12 for row in rows)
    text = page.read_text()
    assert "<h2>the fox" in text and "2 layers of 3 iterations, 16 channels, decay context" in text


def test_table_of_a_single_iteration_shows_no_way_to_another():
    one = {name: [[0.5]] for name in QUANTITIES} | {"cosine": [[None]]}
    assert "->" not in table(one)
    assert table({name: [[*row, 0.25]] for name, (row,) in one.items()}).count("0.5000 ->") == 2


def test_inspect_refuses_a_run_without_iterations(inl, train_config):
    pytest.importorskip("plotly")
    config = train_config(model={"num_iterations": 0})
    Path(config.run_dir).mkdir()
    (Path(config.run_dir) / "config.json").write_text(to_json(config))
    code, _, err = inl("inspect", config.run_dir, "--prompt", "a")
    assert code == 2 and "model.num_iterations=0, so it has no integrator" in err


def test_inspect_names_what_is_missing(inl, tmp_path, monkeypatch):
    pytest.importorskip("plotly")
    code, _, err = inl("inspect", tmp_path / "nowhere", "--prompt", "a")
    assert code == 2 and "nowhere: not a run directory" in err
    code, _, err = inl("inspect", tmp_path)
    assert code == 2 and "--prompt" in err
    code, _, err = inl("inspect", tmp_path, "--prompt", "a", "--out", tmp_path)
    assert code == 2 and f"--out {tmp_path}: is no page" in err
    monkeypatch.setitem(sys.modules, "plotly", None)
    code, _, err = inl("inspect", tmp_path, "--prompt", "a")
    assert code == 2 and err == "error: inl inspect needs plotly: pip install 'inl_jax[report]'\n"
