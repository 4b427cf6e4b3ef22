import json
import os
import pathlib
import shutil

import numpy as np
import pytest

from inl_jax.config import with_fields
from inl_jax.config_file import load_config
from inl_jax.data.corpus import prepare
from inl_jax.storage.run_dir import read_config, record_run
from inl_jax.tokens.tokenizer import load_tokenizer

CACHE = os.environ["JAX_COMPILATION_CACHE_DIR"]  # set in conftest.py


def test_evaluate_reads_the_whole_split_whatever_the_batch_size_and_mesh(trained, inl):
    config, run_dir = trained

    def evaluate(*args):
        code, out, err = inl("evaluate", "--checkpoint", run_dir, "--json", *args)
        assert code == 0 and out.count("\n") == 1, err
        assert err.splitlines()[0] == f"compiled programs are kept in {CACHE}"
        return json.loads(out)

    whole = evaluate()
    corpus = prepare(load_config(config).data)
    assert whole["tokens"] == corpus.sources[0].validation_tokens
    assert whole["loss"] == evaluate()["loss"]
    np.testing.assert_allclose(evaluate("--batch_size", 3)["loss"], whole["loss"], rtol=1e-6)
    split = evaluate("--mesh.data", 2, "--mesh.fsdp", 2, "--mesh.tensor", 2)
    np.testing.assert_allclose(split["loss"], whole["loss"], rtol=1e-5)
    np.testing.assert_allclose(whole["perplexity"], np.exp(whole["loss"]))


@pytest.mark.slow  # tests/sampling reads such a run in the default tests
def test_evaluate_reads_a_run_of_another_device(trained, inl, tmp_path):
    """As it was trained on eight Hopper GPUs, of which none is here."""
    run_dir = shutil.copytree(trained[1], tmp_path / "run")
    there = {"model.integrator_kernel": "mosaic", "model.remat": "auto", "mesh.fsdp": 8}
    there |= {"accumulate_steps": "auto", "optim.state_memory": "pinned_host"}
    config = with_fields(read_config(run_dir), there | {"run_dir": str(run_dir)})
    record_run(config, load_tokenizer("bytes"))
    losses = []
    for run in (trained[1], run_dir):
        code, out, err = inl("evaluate", run, "--json")
        assert code == 0, err
        losses.append(json.loads(out)["loss"])
    assert err.splitlines()[1] == (
        "model.integrator_kernel=mosaic: not for this model on this device; xla computes the same, "
        "but for rounding"
    )
    assert losses[0] == losses[1]


def test_evaluate_reads_any_text_and_counts_its_bytes(trained, inl, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("a text of its own, as short as it is")
    code, out, err = inl("evaluate", "--checkpoint", trained[1], "--json", "--data", other)
    assert code == 0, err
    found = json.loads(out)
    assert found["tokens"] == len(other.read_text()) + 1  # and an end token
    bits = found["loss"] / np.log(2) * found["tokens"] / 36
    np.testing.assert_allclose(found["bits_per_byte"], bits)


def test_evaluate_reads_the_column_of_the_run_or_one_that_is_named(trained, inl, tmp_path):
    run_dir = shutil.copytree(trained[1], tmp_path / "run")
    config = read_config(run_dir)
    record_run(
        with_fields(config, {"data.column": "body", "run_dir": str(run_dir)}),
        load_tokenizer("bytes"),
    )
    rows = {
        "a.jsonl": {"title": "abc", "body": "abcdefgh", "text": "ab"},
        "b.jsonl": {"title": "abc", "text": "abcde"},
        "c.jsonl": {"title": "abc"},
    }
    for name, row in rows.items():
        (tmp_path / name).write_text(json.dumps(row) + "\n")

    def evaluate(name, *flags):
        code, out, err = inl("evaluate", run_dir, "--json", "--data", tmp_path / name, *flags)
        return json.loads(out)["tokens"] - 1 if code == 0 else err

    assert evaluate("a.jsonl") == 8 and evaluate("b.jsonl") == 5
    assert evaluate("a.jsonl", "--column", "text") == 2
    assert "no column text; set data.column to one of: title" in evaluate(
        "c.jsonl", "--column", "text"
    )
    assert "no text column; set data.column to one of: title" in evaluate("c.jsonl")
    assert evaluate("c.jsonl", "--data.column", "title") == 3
    code, _, err = inl("evaluate", run_dir, "--column", "text")
    assert code == 2 and "--column text: of --data, which is not given" in err


def test_evaluate_names_what_does_not_fit(trained, inl):
    for words in (["--checkpoint", "nowhere"], ["nowhere"], ["--step", "best", "nowhere"]):
        code, _, err = inl("evaluate", *words)
        assert code == 2 and err.startswith("error: nowhere: not a run directory"), words
        assert err.count("\n") == 1
    flags = ["--batch_size", 3, "--mesh.fsdp", 2, "--mesh.data", 1]
    code, _, err = inl("evaluate", "--checkpoint", trained[1], *flags)
    assert code == 2 and "--batch_size 3: must be a multiple of the 2 devices" in err
    code, _, err = inl("evaluate", "--checkpoint", trained[1], "--mesh.fsdp", "some")
    assert code == 2 and "mesh.fsdp='some'" in err


def test_evaluate_takes_other_iterations_and_stops_tokens_early(trained, inl):
    code, out, err = inl("evaluate", trained[1], "--json", "--iterations", 5, "--tol", 9)
    assert code == 0, err
    found = json.loads(out)
    assert [found[name] for name in ("iterations", "tol", "steps_per_token")] == [5, 9, 1]
    code, out, err = inl("evaluate", trained[1], "--iterations", 1)
    wanted = f"1 iteration, tol 0 (1.000 steps per token and block): loss {found['loss']:.5f}"
    assert code == 0 and wanted in out, err


def test_evaluate_names_the_sources_that_it_scores(trained, inl, tmp_path):
    run_dir = shutil.copytree(trained[1], tmp_path / "run")
    paths = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    for path, text in zip(paths, ("aa bb " * 60, "some other text " * 20), strict=True):
        pathlib.Path(path).write_text(text)
    changed = {"paths": tuple(paths), "weights": (1.0, 1.0), "validation_fraction": 0.5}
    changed = {f"data.{name}": value for name, value in changed.items()}
    config = with_fields(read_config(run_dir), changed | {"run_dir": str(run_dir)})
    record_run(config, load_tokenizer("bytes"))
    code, out, err = inl("evaluate", run_dir, "--json")
    assert code == 0 and "WARNING" not in err, err
    found = json.loads(out)
    assert list(found["sources"]) == paths
    assert sum(score["tokens"] for score in found["sources"].values()) == found["tokens"]
    (run_dir / "metrics.jsonl").unlink()  # an imported model was trained on an unknown text
    _, again, err = inl("evaluate", run_dir, "--json")
    assert json.loads(again)["loss"] == found["loss"]
    assert f"WARNING: {run_dir} has no records of a training" in err
