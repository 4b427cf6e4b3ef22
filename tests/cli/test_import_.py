import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import assert_same
from exported_dir import write_exported
from lively import lively_params, published_params

from inl_jax.interop.published import params_to_torch
from inl_jax.storage.run_dir import read_config, read_tokenizer
from inl_jax.storage.weights import read_params
from inl_jax.tokens.tokenizer import train_bpe


def test_exported_model_becomes_the_run_it_was(inl, tmp_path, model_config):
    config, own = model_config(param_dtype="bfloat16"), train_bpe(["some text"] * 9, 260)
    params = lively_params(config)
    weights = write_exported(tmp_path / "a model", params, config, tokenizer=own)
    args = ["--weights", weights, "--out", tmp_path / "run"]
    code, _, err = inl("import", *args, "--num_iterations", 5)
    assert code == 2 and f"--num_iterations 5: {weights} has 3; leave it out" in err
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").symlink_to("nowhere")
    code, _, err = inl("import", *args)
    assert code == 2 and "run: is there and no empty directory; name a new one" in err
    (tmp_path / "run").unlink()
    code, out, err = inl("import", *args)
    assert code == 0, err
    assert f"{weights}: an exported model (57 arrays of type BF16 in 1 file)" in out
    assert "\na model: " in out and " 3 iterations, width " in out and "parameters bfloat16" in out
    found = read_config(tmp_path / "run")
    assert found.name == "a model" and found.data.tokenizer == "bpe:260"
    assert found.model == dataclasses.replace(config, remat=found.model.remat)
    assert_same(read_params(tmp_path / "run", found.model)[1], params)
    assert read_tokenizer(tmp_path / "run").fingerprint == own.fingerprint
    code, _, err = inl("import", "--weights", tmp_path / "run", "--out", tmp_path / "again")
    assert code == 2 and f"is a run already; use it as it is, in inl evaluate {tmp_path}" in err


def test_exported_model_without_a_tokenizer_needs_one_by_name(inl, tmp_path, model_config):
    config = model_config()
    weights = write_exported(tmp_path / "exported", lively_params(config), config)
    (weights / "tokenizer.json").unlink()
    args = ["--weights", weights, "--out", tmp_path / "run", "--param_dtype", "bfloat16"]
    code, _, err = inl("import", *args)
    assert code == 2 and f"{weights}/tokenizer.json" in err and "--tokenizer" in err
    assert inl("import", *args, "--tokenizer", "bytes")[0] == 0
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["data"]["tokenizer"] == "bytes"
    assert written["model"]["param_dtype"] == "bfloat16"


def test_published_weights_become_a_run_that_goes_round(inl, tmp_path, model_config):
    torch = pytest.importorskip("torch", reason="the torch extra is not installed")
    config = model_config(context="mean", kappa=float("inf"))
    params = published_params(config)
    weights = params_to_torch(params, config)
    torch.save({k: torch.from_numpy(np.array(v)) for k, v in weights.items()}, tmp_path / "w.pt")
    args = ["--weights", tmp_path / "w.pt", "--out", tmp_path / "run"]
    code, _, err = inl("import", *args)
    assert code == 2 and err.startswith("error: --num_iterations is missing")
    args += ["--num_iterations", 3]
    code, _, err = inl("import", *args, "--tokenizer", "gpt2")
    assert code == 2 and "50257" in err and not (tmp_path / "run").exists()
    code, out, err = inl("import_torch", *args, "--tokenizer", "bytes")
    assert code == 0, err
    assert f"{tmp_path}/w.pt: a published model" in out
    _, found = read_params(tmp_path / "run", config)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, found)
    assert inl("import", *args)[0] == 2, "an existing run must not be overwritten"
    (tmp_path / "junk.pt").write_bytes(b"junk")
    args = ["--weights", tmp_path / "junk.pt", "--num_iterations", 3, "--out", tmp_path / "no"]
    code, _, err = inl("import", *args)
    assert code == 2 and err.startswith("error: ") and "junk.pt: not a .pt file" in err
