"""The one call that measures a GPU: its plan, what it leaves behind, and a dry run of it."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").glob("*.py")]
# Runs of weeks, and sentences about something else.
LEFT_OUT = r"Loss  |Rows for a GPU say|Attention was not measured"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu")


def rows_of(gpu):
    return sys.modules[gpu.Row.__module__]


@pytest.fixture
def measure(gpu, monkeypatch, tmp_path):
    """`measure(rows, *flags)`: the table, in which each row does what its `measure` says."""
    monkeypatch.setattr(
        gpu, "measure_apart", lambda row, limit, *_, tiny: row.measure(row, limit, tiny)
    )
    out = tmp_path / "found.json"

    def run(rows, *flags):
        monkeypatch.setattr(gpu, "ROWS", rows)
        monkeypatch.setattr(gpu, "NAMES", [row.name for row in rows])
        gpu.main(["--out", str(out), *flags])
        return json.loads(out.read_text())["rows"]

    return run


def device(row, limit, tiny):
    yield {"case": "NVIDIA H100", "limit": limit}


def test_the_plan_of_all_rows_takes_less_than_nine_minutes(gpu, capsys):
    gpu.main(["--list"])
    *_, total = capsys.readouterr().out.splitlines()
    assert total.split() == ["all", str(sum(row.seconds for row in gpu.ROWS))]
    assert sum(row.seconds for row in gpu.ROWS) < 9 * 60
    assert gpu.ROWS[0].name == "device" and len(set(gpu.NAMES)) == len(gpu.ROWS)


def test_every_figure_that_is_not_measured_has_a_row(gpu):
    fills = [gap.split(" ", 1) for row in gpu.ROWS for gap in row.fills]
    missing = [
        f"{page.relative_to(ROOT)}: {line}"
        for page in PAGES
        for line in page.read_text().splitlines()
        if page.name != "LOG.md"
        and re.search(r"not measured", line, re.IGNORECASE)
        and not re.search(LEFT_OUT, line)
        and not any(page == ROOT / path and word in line for path, word in fills)
    ]
    assert not missing, "give benchmarks/gpu_rows.py a row for it"


def test_a_row_that_fails_loses_only_itself_and_what_it_measured_stays(gpu, measure):
    def fails(row, limit, tiny):
        yield {"case": "first", "seconds": 1.5}
        yield {"failed": "out of memory"}

    def works(row, limit, tiny):
        yield {"case": "alone", "limit": limit}

    Row = gpu.Row
    rows = measure(
        [
            Row("device", 1, "", device),
            Row("fails", 20, "", fails),
            Row("too_long", 3600, "", works),
            Row("works", 20, "", works),
        ]
    )
    assert rows[0]["limit"] > 500  # a cold start
    assert rows[1:3] == [
        {"row": "fails", "case": "first", "seconds": 1.5},
        {"row": "fails", "failed": "out of memory"},
    ]
    assert rows[3]["failed"].startswith("not started: 3600 s are planned, 5")
    assert rows[4] == {"row": "works", "case": "alone", "limit": 40}


def test_a_process_that_crashes_or_takes_too_long_says_so_in_one_line(gpu, tmp_path, monkeypatch):
    script = tmp_path / "child.py"
    monkeypatch.setattr(gpu, "__file__", str(script))
    row = gpu.Row("row", 1, "", device)

    def outcome(code, limit=60):
        script.write_text(code)
        with open(tmp_path / "log", "w+") as log:
            return list(gpu.measure_apart(row, limit, log, str(tmp_path), tiny=True))

    first = 'import sys, time, os; print(\'{"case": "a"}\', flush=True);'
    assert outcome(first) == [{"case": "a"}]
    assert outcome(first + "sys.exit('one\\ntwo')") == [{"case": "a"}, {"failed": "two"}]
    assert outcome(first + "os.abort()")[1]["failed"].startswith("ended by signal 6: ")
    assert outcome(first + "time.sleep(60)", 0.5)[1:] == [{"failed": "stopped after 0 s"}]


def test_jax_takes_the_memory_fraction_of_a_row_whatever_the_user_has_set(
    gpu, tmp_path, monkeypatch
):
    script, names = (
        tmp_path / "child.py",
        ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"],
    )
    script.write_text(f"import json, os; print(json.dumps([os.environ[n] for n in {names}]))")
    monkeypatch.setattr(gpu, "__file__", str(script))
    for name in names:
        monkeypatch.setenv(name, ".5")
    with open(tmp_path / "log", "w+") as log:
        (found,) = gpu.measure_apart(gpu.ROWS[0], 60, log, str(tmp_path), tiny=True)
    assert sorted(found) == ["", ".95"]  # JAX refuses both


def test_what_a_library_prints_is_no_record(gpu, capfd):
    def noisy(tiny):
        os.write(1, b"from C\n")
        yield {"case": "a"}

    gpu.measure_here(gpu.Row("row", 1, "", noisy), tiny=True)
    assert capfd.readouterr() == ('{"case": "a"}\n', "from C\n")


def test_a_case_that_runs_out_of_memory_does_not_cost_the_next(gpu):
    def fails():
        yield {"case": "a"}
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no memory\nand a list")

    found = list(rows_of(gpu).attempt("b", fails()))
    assert found == [{"case": "a"}, {"case": "b", "failed": "RESOURCE_EXHAUSTED: no memory"}]


def test_the_peak_of_an_earlier_case_is_not_taken_for_that_of_a_later_one(gpu, monkeypatch):
    rows, peaks = rows_of(gpu), iter([3, 5, 5, 5])
    monkeypatch.setattr(rows, "peak_memory", lambda: (next(peaks), ""))
    monkeypatch.setattr(rows, "training", lambda *_: {"peak_bytes": next(peaks)})
    assert [rows.updates(None, 1) for _ in range(2)] == [{"peak_bytes": 5}, {}]


@pytest.fixture
def alone(tmp_path):
    """`alone(*flags)`: the script in a process in which grain cannot be imported."""
    (tmp_path / "grain.py").write_text("raise ImportError('this machine has no grain')\n")

    def run(*flags):
        return subprocess.run(
            [sys.executable, "benchmarks/gpu.py", "--out", str(tmp_path / "found.json"), *flags],
            cwd=ROOT,
            env=os.environ
            | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        ), tmp_path / "found.json"

    return run


@pytest.mark.slow
def test_a_dry_run_measures_every_row_without_grain(gpu, alone):
    done, out = alone("--dry_run", "--minutes", "30")
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert list(dict.fromkeys(row["row"] for row in rows)) == gpu.NAMES
    failed = {row["row"]: row["failed"] for row in rows if "failed" in row}
    assert failed.keys() <= {"train_mosaic"}  # a kernel is interpreted in rows of its own alone
    assert all("needs a Hopper GPU" in why for why in failed.values())
    assert [row["equal"] for row in rows if "equal" in row] == ["yes"]
    assert out.with_suffix(".md").read_text().count("\n| train |") == 1


@pytest.mark.slow
def test_without_a_gpu_it_refuses_in_one_line(alone):
    done, out = alone()
    assert done.returncode == 2 and not out.exists()
    assert "no CUDA device here" in done.stderr.splitlines()[-1]
