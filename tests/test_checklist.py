import importlib.util
import json
import time
from pathlib import Path

import pytest

from inl_jax import checklist as the_list
from inl_jax.checklist import as_table, check_setup, checklist
from inl_jax.config import InputError, MeshConfig
from inl_jax.planning import preflight

WHAT_TRAIN_CHECKS = [*the_list.SETUP_CHECKS, *preflight.MACHINE_CHECKS, *preflight.DATA_CHECKS]


def verdicts(config, **what):
    return {check.name: check.verdict for check in checklist(config, **what)}


def found(config, name):
    return next(check for check in checklist(config) if check.name == name)


def files(folder):
    return {path for path in Path(folder).rglob("*") if "cache" not in path.parts}


def test_checklist_makes_every_check_of_train_and_leaves_nothing_behind(train_config, tmp_path):
    before = files(tmp_path)
    rows = verdicts(train_config())
    assert set(rows) >= {*WHAT_TRAIN_CHECKS, "data", "checkpoints", "evaluation"}
    assert files(tmp_path) == before
    assert "failed" not in rows.values() and rows["time"] == "not checked"


def test_checklist_goes_on_after_a_failure(train_config, monkeypatch):
    monkeypatch.setattr(preflight, "memory_found", lambda _: (2**16, "free"))
    config = train_config(data={"paths": ("nowhere",)})
    rows = {check.name: check for check in checklist(config)}
    failed = {name for name, check in rows.items() if check.verdict == "failed"}
    assert {"memory of each device", "data"} <= failed
    assert "was found" in rows["memory of each device"].found
    assert "no such file or directory: nowhere" in rows["data"].found
    assert rows["vocabulary"].verdict == "not checked" and rows["evaluation"].verdict == "ok"


def test_checklist_has_the_same_checks_whatever_fails(train_config):
    good = train_config()
    no_mesh = train_config(mesh=MeshConfig(data=99))
    no_data = train_config(data={"paths": ("nowhere",)})
    names = list(verdicts(good))
    assert list(verdicts(no_mesh)) == list(verdicts(no_data)) == names
    assert list(verdicts(good, skip_data=True)) == names
    assert verdicts(no_mesh)["devices"] == "failed"


def test_checklist_without_data_reads_none(train_config, monkeypatch):
    monkeypatch.setattr(preflight, "prepare", lambda *_: pytest.fail("read"))
    rows = verdicts(train_config(), skip_data=True)
    assert {rows[name] for name in ("data", *preflight.DATA_CHECKS)} == {"not checked"}


def test_checklist_compiles_the_step_if_asked(train_config, monkeypatch):
    assert "compiled step" not in verdicts(train_config(), skip_data=True)

    def broken(*_):
        raise RuntimeError("no cuDNN\nand a trace")

    monkeypatch.setattr(the_list, "compile_step", broken)
    rows = {c.name: c for c in checklist(train_config(), skip_data=True, compiled=True)}
    assert rows["compiled step"].verdict == "failed" and rows["compiled step"].found == "no cuDNN"


def test_checklist_shows_the_worst_of_several_processes(train_config, monkeypatch):
    def gather(mine=""):
        rows = [the_list.Check(*row) for row in json.loads(mine)] if mine[:1] == "[" else []
        other = [
            c._replace(verdict="failed", found="full") if c.name == "disk" else c for c in rows
        ]
        return [mine, json.dumps(other)] if rows else [mine]

    monkeypatch.setattr(the_list.processes, "gather", gather)
    rows = {check.name: check for check in checklist(train_config(), skip_data=True)}
    assert rows["disk"].verdict == "failed" and rows["disk"].found == "full"
    assert rows["devices"].verdict == "ok"


def test_data_is_measured_by_parameters_and_by_the_guide(train_config, monkeypatch):
    def with_parameters(number):  # beside the 35,911 tokens of the text
        monkeypatch.setattr(preflight, "param_count", lambda _: number)
        return found(train_config(), "training tokens")

    assert with_parameters(35_911 // 20).verdict == "ok"
    assert with_parameters(35_911 // 20 + 1).verdict == "warning"
    all_held_out = found(train_config(data={"validation_fraction": 1.0}), "training tokens")
    assert all_held_out.found.startswith("0 training tokens") and all_held_out.verdict == "failed"
    large = with_parameters(1_698_414_592)
    assert large.wanted == "33.97B (20 per parameter); the guide's minimum is 10.00B"


def test_time_left_is_held_against_the_end_of_the_job(train_config, tmp_path, monkeypatch):
    config = train_config(num_steps=1002, optim={"warmup_steps": 2})
    folder = Path(config.run_dir)
    folder.mkdir()
    record = {"step": 2, "loss": 1.0, "tokens_per_second": 256.0}  # an update has 8 x 32 tokens
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    check = found(config, "time")
    assert check.verdict == "ok" and check.found == "16m 40s of training left"
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 900))
    assert found(config, "time").verdict == "warning"
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 1100))
    assert found(config, "time").verdict == "ok"


@pytest.mark.parametrize(
    ("installed", "driver", "expected"),
    [
        ({}, None, ("ok", "not checked")),
        ({}, "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue", ("ok", "warning")),
        ({"jax-cuda12-plugin": "0.10.2"}, "Open Kernel Module for x86_64  575.57", ("ok", "ok")),
        ({"jax-cuda13-plugin": "0.10.2"}, "Module  575.57.08", ("ok", "warning")),
        ({"jax-cuda12-plugin": "0.10.1"}, "Module  550.54.15", ("warning", "ok")),
        ({"jax": "0.11.0"}, None, ("warning", "not checked")),
    ],
)
def test_versions_and_driver_must_fit_each_other(
    train_config, monkeypatch, tmp_path, said, installed, driver, expected
):
    here = {"jax": "0.10.2", "jaxlib": "0.10.2"} | installed
    monkeypatch.setattr(the_list, "versions", lambda: here)
    path = tmp_path / "version"
    if driver:
        path.write_text(driver)
    monkeypatch.setattr(the_list, "_DRIVER_FILE", path)
    config = train_config()
    findings = [the_list.SETUP_CHECKS[name](config) for name in ("versions", "driver")]
    assert tuple(finding[-1] for finding in findings) == expected
    check_setup(config)
    assert sum(line.startswith("WARNING: ") for line in said) == expected.count("warning")


def test_check_setup_raises_if_the_run_cannot_be_written_or_tracked(train_config, monkeypatch):
    with pytest.raises(InputError, match="run_dir=.*: Not a directory; name a directory"):
        check_setup(train_config(run_dir=__file__))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"track=trackio: .*pip install .inl_jax\[trackio"):
        check_setup(train_config(track=("trackio",)))


def test_choices_that_lose_work_are_warned_of(train_config):
    rows = verdicts(train_config(save_every=0, eval_every=0), skip_data=True)
    assert rows["checkpoints"] == rows["evaluation"] == "warning"


def test_preflight_prints_a_line_for_each_check_and_ends_with_0_or_2(tiny_run, inl):
    flags = ["--config", tiny_run[0]]
    code, out, err = inl("preflight", *flags)
    assert code == 0 and len(out.splitlines()) >= len(WHAT_TRAIN_CHECKS)
    assert any(line.startswith("ok ") and " disk " in line for line in out.splitlines())
    code, out, err = inl("preflight", *flags, "--model.vocab_size", 100, "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 2 and rows["vocabulary"]["verdict"] == "failed"
    assert rows["vocabulary"].keys() == {"name", "found", "wanted", "verdict"}


def test_table_has_one_line_for_each_check_in_columns():
    rows = [the_list.Check("a", "1", "2", "ok"), the_list.Check("name", "x", "", "not checked")]
    assert as_table(rows).splitlines() == [
        "ok           a     1; wanted: 2",
        "not checked  name  x",
    ]
