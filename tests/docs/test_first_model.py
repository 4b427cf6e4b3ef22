"""docs/first_model.ipynb: it runs, and is committed as it ran."""

import json

import pytest
from inl_process import ROOT

PATH = ROOT / "docs" / "first_model.ipynb"


def outputs_of(cells) -> list[dict]:
    return [output for cell in cells for output in cell.get("outputs", ())]


def printed(outputs) -> str:
    return "".join("".join(output.get("text", "")) for output in outputs)


@pytest.mark.slow
def test_notebook_runs_and_transformers_writes_the_same(tmp_path, text_file, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    for package in ("ipykernel", "matplotlib", "transformers"):
        pytest.importorskip(package)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("HOME", str(tmp_path))
    notebook = nbformat.read(PATH, as_version=4)
    (parameters,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", ())]
    parameters.source = f"num_steps = 20\ntext = {str(text_file)!r}\ntokenizer_spec = 'bytes'"
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=900, resources=place).execute()
    outputs = outputs_of(notebook.cells)
    assert "the same in transformers: True" in printed(outputs)
    assert sum("image/png" in output.get("data", ()) for output in outputs) == 2


def test_committed_notebook_holds_what_one_whole_run_of_it_gave():
    cells = [cell for cell in json.loads(PATH.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, 1 + len(cells))]
    outputs = outputs_of(cells)
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", ()) for output in outputs) == 2
    assert "the same in transformers: True" in printed(outputs)
    assert PATH.stat().st_size < 200_000
