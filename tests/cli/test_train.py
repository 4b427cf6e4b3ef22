import json
import re
import shutil
import sys

import pytest
from inl_process import ROOT, run, run_inl

from inl_jax.config_file import load_config
from inl_jax.failures import DiskFull, MachineFailure, OutOfMemory, Stalled
from inl_jax.model.language_model import param_count


@pytest.mark.parametrize(
    "overrides, named",
    [
        ("--optim.lerning_rate 1", "--optim.learning_rate"),
        # 2,000 GB of weights: an allocation would not survive to the message.
        (
            "--model.d_model 98304 --model.d_ff 393216 --model.num_heads 768",
            r"tiny needs [\d,]+\.\d\d GiB .* [\d,]+\.\d\d GiB was found",
        ),
    ],
    ids=["typo", "too large"],
)
def test_train_answers_a_mistake_with_one_line_and_exit_code_2(tmp_path, overrides, named):
    command = ["train", "--config", ROOT / "configs/tiny.py", *overrides.split()]
    code, _, err, _ = run_inl(*command, cwd=tmp_path)
    assert (
        code == 2 and re.search(named, err) and err.startswith("error: ") and err.count("\n") == 1
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow  # tests/planning/programs/test_xla.py tries flags by default
def test_train_applies_the_compiler_flags_of_the_config_before_jax_starts(tmp_path):
    flags = "--xla_flags=--xla_gpu_enable_latency_hiding_scheduler=true --xla_made_up=1"
    code, out, err, _ = run_inl("train", "--config", "tiny", "--dry_run", flags, cwd=tmp_path)
    assert code == 0, err
    assert "WARNING: XLA here does not take --xla_made_up=1" in out
    assert "--xla_gpu_enable_latency_hiding_scheduler=true\n" in out


def test_dry_run_says_size_and_memory_and_creates_nothing(tmp_path):
    flags = ["--config", "tiny", "--dry-run", "--run-dir", "out", "--data.phases", "1:1"]
    code, out, err, _ = run(sys.executable, ROOT / "scripts/train.py", *flags, cwd=tmp_path)
    assert code == 0, err
    assert f"{param_count(load_config('tiny').model):,} parameters" in out
    assert "GiB" in out and "found" in out
    assert "phase 1 of 1 (1:1): updates 1 to 450 in sequences of 128: stdlib 100%\n" in out
    assert list(tmp_path.iterdir()) == []


def test_dry_run_refuses_what_the_run_in_its_directory_cannot_resume(trained, inl):
    code, _, err = inl("train", "--config", trained[0], "--dry_run", "--model.d_model", 32)
    assert code == 2 and "model.d_model=32, but the run in" in err and err.count("\n") == 1
    code, out, err = inl("train", "--config", trained[0], "--dry_run", "--batch_size", 16)
    assert code == 0 and "changed since the last start: batch_size 8 -> 16" in out, err


def test_train_names_text_that_is_not_there(tiny_run, inl, tmp_path):
    flags = ["--data.paths", "nowhere", "--run_dir", tmp_path / "run"]
    code, _, err = inl("train", "--config", tiny_run[0], *flags)
    assert code == 2 and "no such file or directory: nowhere" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_same_command_again_finds_the_run_complete(trained, inl, tmp_path):
    run_dir = shutil.copytree(trained[1], tmp_path / "run")
    code, out, err = inl("train", "--config", trained[0], "--run_dir", run_dir)
    assert code == 0 and "complete at update 4" in out, err


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (OutOfMemory("needs more"), 12),
        (MemoryError("needs more"), 12),
        (DiskFull("needs more"), 28),
        (Stalled("needs more"), 110),
        (MachineFailure("needs more"), 1),
    ],
)
def test_failure_of_the_machine_is_one_line_and_its_exit_code(
    tiny_run, inl, monkeypatch, failure, code
):
    def fail(config):
        raise failure

    monkeypatch.setattr("inl_jax.trainer.train", fail)
    found, _, err = inl("train", "--config", tiny_run[0])
    assert found == code and re.fullmatch(r"error: .*needs more\n", err)


def test_every_json_file_of_a_run_is_json(trained):
    def refuse(name):
        raise AssertionError(name)

    files = [path for path in trained[1].parent.rglob("*.json*") if path.is_file()]
    ours = [path for path in files if "checkpoints" not in path.parts]
    names = {path.name for path in ours}
    assert {"config.json", "env.json", "best.json", "metrics.jsonl", "meta.json"} <= names
    for path in ours:
        text = path.read_text(encoding="utf-8")
        for part in text.splitlines() if path.suffix == ".jsonl" else [text]:
            json.loads(part, parse_constant=refuse)


@pytest.mark.slow
@pytest.mark.parametrize("redirected", ["> /dev/full 2>&1", ">&- 2>&-", "2>&1 | true"])
def test_train_ends_well_whatever_becomes_of_its_output_and_log(tiny_run, tmp_path, redirected):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").symlink_to("/dev/full")
    (run_dir / "env.json").mkdir()
    (run_dir / "samples").write_text("in the way")
    flags = "--sample_every 2 --sample_tokens 4 --sample_prompts é 猫"
    command = (
        f"{sys.executable} -m inl_jax train --config {tiny_run[0]} --run_dir {run_dir} {flags}"
    )
    code, _, err, _ = run("bash", "-c", f"set -o pipefail; {command} {redirected}")
    assert (code, err) == (0, "") and (run_dir / "checkpoints" / "4").is_dir()


@pytest.mark.slow
def test_train_names_a_run_dir_in_any_letters_and_shows_what_ascii_can(tiny_run, tmp_path):
    run_dir = tmp_path / "mein \n lauf 日本"
    flags = ["--run_dir", run_dir, "--sample_every", 4, "--sample_prompts", "é"]
    flags += ["--sample_tokens", 4]
    ascii_only = ["env", "PYTHONIOENCODING=ascii", sys.executable, "-m", "inl_jax"]
    code, out, err, _ = run(*ascii_only, "train", "--config", tiny_run[0], *flags)
    assert code == 0 and out.isascii() and (run_dir / "checkpoints" / "4").is_dir(), err
