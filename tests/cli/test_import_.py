import jax
import numpy as np
import pytest

from inl_jax.interop.published import params_to_torch
from inl_jax.model.language_model import init_params
from inl_jax.storage.weights import read_params


def test_published_weights_become_a_run_that_goes_round(inl, tmp_path, model_config):
    torch = pytest.importorskip("torch", reason="the torch extra is not installed")
    config = model_config(context="mean", kappa=float("inf"))
    params = init_params(config, jax.random.key(0))
    params["blocks"]["integrator"]["gamma"] *= 0
    weights = params_to_torch(params, config)
    torch.save({k: torch.from_numpy(np.array(v)) for k, v in weights.items()}, tmp_path / "w.pt")
    args = ["--weights", tmp_path / "w.pt", "--num_iterations", 3, "--out", tmp_path / "run"]
    code, _, err = inl("import", *args, "--tokenizer", "gpt2")
    assert code == 2 and "50257" in err and not (tmp_path / "run").exists()
    code, _, err = inl("import_torch", *args, "--tokenizer", "bytes")
    assert code == 0, err
    _, found = read_params(tmp_path / "run", config)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, found)
    assert inl("import", *args)[0] == 2, "an existing run must not be overwritten"
    (tmp_path / "junk.pt").write_bytes(b"junk")
    args = ["--weights", tmp_path / "junk.pt", "--num_iterations", 3, "--out", tmp_path / "no"]
    code, _, err = inl("import", *args)
    assert code == 2 and err.startswith("error: ") and "junk.pt: not a .pt file" in err
