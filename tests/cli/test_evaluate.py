import json
import os

import numpy as np

from inl_jax.config_file import load_config
from inl_jax.data.corpus import prepare

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


def test_evaluate_reads_any_text_and_counts_its_bytes(trained, inl, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("a text of its own, as short as it is")
    code, out, err = inl("evaluate", "--checkpoint", trained[1], "--json", "--data", other)
    assert code == 0, err
    found = json.loads(out)
    assert found["tokens"] == len(other.read_text()) + 1  # and an end token
    bits = found["loss"] / np.log(2) * found["tokens"] / 36
    np.testing.assert_allclose(found["bits_per_byte"], bits)


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
