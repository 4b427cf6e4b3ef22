import contextlib
import importlib.util
import json
import math
import re
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from integrator_cases import layer_params

from inl_jax import checklist as the_list
from inl_jax.checklist import as_table, check_setup, checklist
from inl_jax.config import InputError, MeshConfig, Phase
from inl_jax.curriculum import make_curriculum, note_read
from inl_jax.data.corpus import prepare
from inl_jax.model.dynamics import Dynamics
from inl_jax.model.integrator import integrate
from inl_jax.planning import preflight
from inl_jax.storage.checkpoint import Checkpoints
from inl_jax.storage.run_dir import record_run
from inl_jax.trainer import train

WHAT_TRAIN_CHECKS = [*the_list.SETUP_CHECKS, *preflight.MACHINE_CHECKS, *preflight.DATA_CHECKS]


def verdicts(config, **what):
    return {check.name: check.verdict for check in checklist(config, **what)}


def found(config, name):
    return next(check for check in checklist(config) if check.name == name)


def write_update(config, **fields):
    """Adds the record of an update to a run that has not been trained."""
    folder = Path(config.run_dir)
    folder.mkdir(exist_ok=True)
    with open(folder / "metrics.jsonl", "a") as log:
        log.write(json.dumps({"loss": 1.0} | fields) + "\n")


def files(folder):
    return {path for path in Path(folder).rglob("*") if "cache" not in path.parts}


def test_checklist_makes_every_check_of_train_and_leaves_nothing_behind(train_config, tmp_path):
    before = files(tmp_path)
    rows = verdicts(train_config())
    assert set(rows) >= {*WHAT_TRAIN_CHECKS, "data", "checkpoints", "evaluation"}
    assert files(tmp_path) == before
    assert "failed" not in rows.values() and rows["time"] == "not checked"
    (row,) = [check for check in checklist(train_config(), skip_data=True) if check[0] == "recipe"]
    assert row.found == "1 micro-batch of 8 sequences, remat none, as asked"


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


def test_tokens_and_time_are_counted_in_the_lengths_of_the_phases(train_config):
    phases = (Phase(share=0.5, weights=(1,), seq_len=8), Phase(share=0.5, weights=(1,)))
    config = train_config(num_steps=1000, data={"phases": phases})
    write_update(config, step=500, tokens_per_second=128.0)
    assert "160.00k will be read" in found(config, "training tokens").found  # 8 x 8 and 8 x 32
    assert found(config, "time").found == "16m 40s of training left"  # 500 updates of 8 x 32


@pytest.mark.parametrize("damaged", [0, 0.0, None, "x", math.nan, math.inf, -1, 1e-320, [1]])
def test_time_left_goes_by_the_last_speed_that_is_one(train_config, damaged):
    config = train_config(num_steps=1002)
    write_update(config, step=3, tokens_per_second=damaged)
    assert found(config, "time").verdict == "not checked"
    write_update(config, step=2, tokens_per_second=256.0)
    assert found(config, "time").found == "16m 40s of training left"


@pytest.mark.parametrize("end", ["abc", "-5", "", "9" * 400, "9" * 5000, "1e5"])
def test_time_without_an_end_of_the_job_that_is_plausible_has_none(train_config, monkeypatch, end):
    monkeypatch.setenv("SLURM_JOB_END_TIME", end)
    assert found(train_config(), "time").wanted == ""


def test_time_left_is_held_against_the_end_of_the_job(train_config, tmp_path, monkeypatch):
    config = train_config(num_steps=1002, optim={"warmup_steps": 2})
    write_update(config, step=2, tokens_per_second=256.0)  # an update has 8 x 32 tokens
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


@pytest.mark.parametrize(
    "verdict, fields",
    [
        ("ok", {"num_iterations": 0}),
        ("ok", {"num_iterations": 15, "context": "mean"}),
        ("ok", {"num_iterations": 1, "dt": 1.0, "context": "gated"}),
        ("warning", {"num_iterations": 1, "dt": 1.0, "context": "attention"}),
        ("ok", {"num_iterations": 15, "dt": 0.1, "context": "decay"}),
        ("warning", {"num_iterations": 15, "dt": 0.1, "context": "gated"}),
        ("ok", {"num_iterations": 15, "dt": 0.1, "context": "gated", "initial_beta": 0.02}),
        ("ok", {"num_iterations": 1, "dt": 1.0, "context": "attention", "initial_beta": 0.02}),
    ],
)
def test_a_strong_pull_at_the_start_is_warned_of(train_config, verdict, fields):
    found, wanted, got = the_list.CHOICES["pull to mu"](train_config(model=fields))
    assert got == verdict and ("initial_beta 0.02" in wanted) == (verdict == "warning")


def test_pull_is_what_fresh_integrators_take_away(train_config):
    config = train_config(model={"num_iterations": 4, "dt": 0.3, "controller_width": 0})
    x_BSD = jax.random.normal(jax.random.key(0), (1, 64, config.model.d_model))
    last_BSD = integrate(
        *(layer_params(config.model), x_BSD, x_BSD),
        amplitude=0.0,
        num_iterations=4,
        dynamics=Dynamics(0.3, 1.0, x_BSD.dtype),
    )
    left = float((x_BSD * last_BSD).sum() / (x_BSD * x_BSD).sum())
    found, _, _ = the_list.CHOICES["pull to mu"](config)
    (percent,) = re.findall(r"(\d+)%", found)
    assert abs(int(percent) / 100 - (1 - left)) < 0.02


def test_preflight_prints_a_line_for_each_check_and_ends_with_0_or_2(tiny_run, inl):
    flags = ["--config", tiny_run[0]]
    code, out, err = inl("preflight", *flags)
    assert code == 0 and len(out.splitlines()) >= len(WHAT_TRAIN_CHECKS)
    assert any(line.startswith("ok ") and " disk " in line for line in out.splitlines())
    code, out, err = inl("preflight", *flags, "--model.vocab_size", 100, "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 2 and rows["vocabulary"]["verdict"] == "failed"
    assert rows["vocabulary"].keys() == {"name", "found", "wanted", "verdict"}


def test_preflight_refuses_what_train_would_for_the_run_in_the_directory(trained, inl):
    def rows(*flags):
        code, out, _ = inl("preflight", "--config", trained[0], "--json", *flags)
        return code, {row["name"]: row for row in json.loads(out)}["run in run_dir"]

    code, same = rows()
    assert code == 0 and same["verdict"] == "ok" and same["found"] == "at update 4"
    assert (
        rows("--batch_size", 16)[1]["found"]
        == "at update 4; changed since the last start: batch_size 8 -> 16"
    )
    for flags in ([], ["--skip_data"]):
        code, other = rows("--model.d_model", 32, *flags)
        assert code == 2 and other["verdict"] == "failed"
        assert "model.d_model=32, but the run in" in other["found"]
    assert rows("--run_dir", trained[1] / "none")[1]["found"] == "none"


def test_checklist_refuses_a_change_of_a_phase_that_is_over(train_config):
    def with_phases(*texts):
        return train_config(data={"phases": tuple(map(Phase.parse, texts))})

    config = with_phases("0.5:1", "0.5@16:1")
    corpus = prepare(config.data)
    record_run(config, corpus.tokenizer)
    position = {"samples_seen": 48, "seq_len": 32, "data": corpus.fingerprint}
    position["phases"] = note_read(make_curriculum(config, 8), 48)
    with contextlib.closing(Checkpoints(config.run_dir, keep_last=1)) as saved:
        saved.save(6, {"w": np.zeros(2)}, position=position)
        saved.wait()
    assert found(config, "run in run_dir")[1:] == (
        "at update 6",
        "the same model and tokenizer",
        "ok",
    )
    assert found(with_phases("0.5:1", "0.5@8:1"), "run in run_dir").verdict == "ok"
    over = found(with_phases("0.5@8:1", "0.5@16:1"), "run in run_dir")
    assert over.verdict == "failed" and "it is over in" in over.found


def test_checklist_goes_on_after_a_file_that_cannot_be_read(train_config, monkeypatch):
    def fail(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("inl_jax.planning.preflight.Path.exists", fail)
    rows = verdicts(train_config())
    assert rows["run directory"] == rows["disk"] == rows["run in run_dir"] == "failed"
    assert rows["vocabulary"] == "ok"


def test_table_has_one_line_for_each_check_in_columns():
    rows = [the_list.Check("a", "1", "2", "ok"), the_list.Check("name", "x", "", "not checked")]
    assert as_table(rows).splitlines() == [
        "ok           a     1; wanted: 2",
        "not checked  name  x",
    ]


@pytest.mark.parametrize("config", [None, "tiny", {"num_steps": 1}])
def test_train_answers_what_is_no_config_with_one_line(config):
    with pytest.raises(InputError, match="must be a TrainConfig"):
        train(config)
