import json
import os
import shutil

import pytest


@pytest.fixture
def run_dir(trained, tmp_path):
    """A copy of a trained run, to damage."""
    return shutil.copytree(trained[1], tmp_path / "run")


def test_verify_finds_nothing_wrong_with_a_run(inl, run_dir):
    code, out, _ = inl("verify", run_dir)
    assert code == 0
    assert {line.split(": ")[0] for line in out.splitlines()} == {
        "checkpoint 4",
        *("config.json", "tokenizer.json", "best.json", "last_save.json", "metrics.jsonl"),
        "env.json",
    }
    assert all(line.endswith(": good") for line in out.splitlines())


def spoil(run_dir, name, text=b"[" * 10_000 + b"\n"):
    (run_dir / name).write_bytes(text)


@pytest.mark.parametrize(
    "damage, line",
    [
        (lambda run: spoil(run, "config.json"), "config.json: damaged"),
        (lambda run: os.unlink(run / "tokenizer.json"), "tokenizer.json: damaged"),
        (lambda run: spoil(run, "best.json"), "best.json: damaged (not what training wrote"),
        (lambda run: spoil(run, "metrics.jsonl"), "metrics.jsonl: damaged (line 1 is no JSON"),
        (lambda run: spoil(run, "env.json"), "env.json: damaged"),
        (
            lambda run: shutil.rmtree(run / "checkpoints/4"),
            "best.json: damaged (names checkpoint 4, which is not there)",
        ),
        (
            lambda run: spoil(run, "checkpoints/4/params/_METADATA"),
            "checkpoint 4: damaged (params/_METADATA has 10001 bytes",
        ),
        (
            lambda run: spoil(run, "checkpoints/4/notes.txt"),
            "checkpoint 4: damaged (also holds 'notes.txt'",
        ),
    ],
)
def test_verify_names_what_is_damaged(inl, run_dir, damage, line):
    damage(run_dir)
    code, out, _ = inl("verify", run_dir)
    assert code == 1 and line in out
    assert json.loads(inl("verify", run_dir, "--json")[1])["good"] is False


def test_verify_passes_a_checkpoint_without_manifest_by_name(inl, run_dir):
    (run_dir / "checkpoints/4/manifest.json").unlink()
    code, out, _ = inl("verify", run_dir, "--step", "best")
    assert code == 0
    assert out == "checkpoint 4: unverified (it has no manifest)\n"


def test_verify_answers_a_mistake_in_one_line(inl, run_dir, tmp_path):
    code, _, err = inl("verify", run_dir, "--step", "7")
    assert code == 2 and "no checkpoint '7'; there are [4]" in err
    code, _, err = inl("verify", tmp_path / "nothing")
    assert code == 2 and "not a run directory" in err
