import json
import os
import subprocess
import sys

import pytest
from inl_process import ROOT, run_inl

from inl_jax.sampling import LanguageModel
from inl_jax.sampling.continuation import Continuation

CACHE = os.environ["JAX_COMPILATION_CACHE_DIR"]  # set in conftest.py


FLAGS = ["--max_new_tokens", 5, "--temperature", 0, "--prompt", "the quick", "a", ""]


def test_generate_continues_every_prompt(trained, inl):
    code, out, err = inl("generate", "--checkpoint", trained[1], *FLAGS)
    assert err.startswith(f"compiled programs are kept in {CACHE}\n") and " tokens in " in err
    assert code == 0 and out.startswith("the quick") and out.count("-" * 40) == 3


def test_generate_streams_the_text_that_json_records(trained, inl, tmp_path):
    (tmp_path / "prompt").write_text("the quick")
    asked = ["generate", trained[1], "--prompt_file", tmp_path / "prompt", "--max_new_tokens", 12]
    code, out, _ = inl(*asked)
    _, recorded, _ = inl(*asked, "--json")
    recorded = json.loads(recorded)
    (sample,) = recorded["samples"]
    assert code == 0 and out == f"the quick{sample['text']}\n"
    assert recorded["settings"]["temperature"] == 0.8
    assert sample["prompt"] == "the quick" and sample["num_tokens"] == 12
    assert sample["finish_reason"] == "length" and sample["mean_log_probability"] < 0

    model = LanguageModel.from_run(trained[1])
    stop = sample["text"][4:6]
    expected = model.generate("the quick", max_new_tokens=12, temperature=0.8, stop=[stop])
    assert inl(*asked, "--stop", stop)[1] == f"the quick{expected}\n"
    assert expected == sample["text"][: sample["text"].index(stop)]


def test_generate_says_that_a_text_is_empty_instead_of_an_empty_line(trained, inl, monkeypatch):
    def grow(self, prompt, **settings):
        text = Continuation(self.tokenizer, prompt, [0], limit=9)
        text.add([], [], ended=True)
        yield [text]

    monkeypatch.setattr(LanguageModel, "grow", grow)
    code, out, err = inl("generate", trained[1], "--prompt", "")
    assert (code, out) == (0, "") and "the text is empty: the model gave its end token" in err


@pytest.mark.slow
def test_generate_gives_the_same_text_on_any_mesh(trained, inl):
    _, out, _ = inl("generate", "--checkpoint", trained[1], *FLAGS)
    mesh = ["--mesh.data", 1, "--mesh.fsdp", 2, "--mesh.tensor", 2]
    code, split, err = inl("generate", "--checkpoint", trained[1], *mesh, *FLAGS)
    assert code == 0 and split == out, err


@pytest.mark.parametrize(
    "flags, named",
    [
        (["nowhere"], "nowhere: not a run directory"),
        ([".", "--num_samples", 0], "--num_samples 0"),
        ([".", "--max_new_tokens", -1], "--max_new_tokens -1"),
        ([".", "--seed", -1], "--seed -1"),
        ([".", "--stop", "a", ""], "--stop: a string is empty"),
        ([".", "--interactive", "--json"], "one line at a time"),
        ([".", "--interactive", "--prompt", "-"], "reads lines from stdin"),
        ([".", "--prompt_file", "nowhere"], "--prompt_file nowhere: cannot be read"),
    ],
)
def test_generate_names_a_mistake(inl, tmp_path, monkeypatch, flags, named):
    monkeypatch.chdir(tmp_path)
    code, _, err = inl("generate", *flags)
    assert code == 2 and named in err


def test_generate_names_a_closed_stdin_that_a_conversation_would_read(inl, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    code, _, err = inl("generate", ".", "--interactive")
    assert code == 2 and "reads lines from stdin, which is closed" in err


@pytest.mark.slow
def test_generate_reads_a_pipe_and_ends_quietly_when_its_reader_goes(trained):
    flags = ["generate", trained[1], "--max_new_tokens", 9, "--temperature", 0]
    code, piped, err, _ = run_inl(*flags, stdin=subprocess.PIPE)
    assert code == 0, err  # nothing piped in: a new document
    command = f"printf 'the quick' | {sys.executable} -m inl_jax generate {trained[1]} "
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    found = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} --max_new_tokens 99999 | head -c 20"],
        capture_output=True,
        env=env,
        timeout=300,
    )
    assert found.returncode == 0 and found.stdout.startswith(b"the quick"), found.stderr
    assert len(found.stdout) == 20 and b"Traceback" not in found.stderr
    full = subprocess.run(
        ["bash", "-c", f"{command} --max_new_tokens 20 > /dev/full"],
        capture_output=True,
        env=env,
        timeout=300,
    )
    last = full.stderr.decode().splitlines()[-1]
    assert full.returncode == 1 and last.startswith("error: the result cannot be written")
