import re
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


@pytest.mark.slow  # tests/planning/test_xla.py tries flags by default
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


def test_the_same_command_again_finds_the_run_complete(trained, inl):
    code, out, err = inl("train", "--config", trained[0])
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
