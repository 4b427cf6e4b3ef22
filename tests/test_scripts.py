"""The scripts, run in this process on a model of seconds."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from inl_jax import train
from inl_jax.data.corpus import prepare
from inl_jax.interop import published as interop
from inl_jax.model.language_model import init_params
from inl_jax.training.checkpoint import read_params

CACHE = os.environ["JAX_COMPILATION_CACHE_DIR"]  # set in conftest.py
SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Runs a script's main with arguments; returns (exit code, stdout, stderr)."""

    def run(name, *args):
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        code = 0
        try:
            runpy.run_path(str(SCRIPTS / name), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def trained(train_config):
    config = train_config(num_steps=4)
    train(config)
    return config


def test_a_trained_run_is_evaluated_sampled_and_drawn(trained, run_script, tmp_path):
    def evaluate(*args):
        code, out, err = run_script("evaluate.py", "--checkpoint", trained.run_dir, "--json", *args)
        assert code == 0 and err == f"compiled programs are kept in {CACHE}\n"
        return json.loads(out.splitlines()[-1])

    whole = evaluate()
    assert whole["tokens"] == prepare(trained.data).sources[0].validation_tokens
    assert whole["loss"] == evaluate()["loss"]
    np.testing.assert_allclose(evaluate("--batch_size", 3)["loss"], whole["loss"], rtol=1e-6)
    np.testing.assert_allclose(whole["perplexity"], np.exp(whole["loss"]))
    other = tmp_path / "other.txt"
    other.write_text("a text of its own, as short as it is")
    on_text = evaluate("--data", other)
    assert on_text["tokens"] == len(other.read_text()) + 1  # and an end token
    np.testing.assert_allclose(
        on_text["bits_per_byte"], on_text["loss"] / np.log(2) * on_text["tokens"] / 36
    )

    prompts = ["the quick", "a", ""]
    code, out, err = run_script(
        "generate.py", "--checkpoint", trained.run_dir, "--max_new_tokens", 5, "--prompt", *prompts
    )
    assert err == f"compiled programs are kept in {CACHE}\n"
    assert code == 0 and out.startswith("the quick") and out.count("-" * 40) == 3

    code, out, _ = run_script("plot.py", trained.run_dir)
    assert code == 0 and (Path(trained.run_dir) / "loss.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("name", "args", "named"),
    [
        ("evaluate.py", ["--checkpoint", "nowhere"], "nowhere: not a run directory"),
        ("generate.py", ["--checkpoint", "nowhere"], "nowhere: not a run directory"),
        ("plot.py", ["nowhere"], "nowhere: no metrics.jsonl"),
        ("prepare_data.py", ["--config", "nowhere.py"], "nowhere.py: no such file"),
        ("train.py", ["--config", "tiny", "--data.paths", "nowhere"], "no such file or directory"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    run_script, name, args, named, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    code, _, err = run_script(name, *args)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and named in err


def test_published_weights_become_a_run_that_goes_round(run_script, tmp_path, model_config):
    torch = pytest.importorskip("torch", reason="the torch extra is not installed")
    config = model_config(context="mean", kappa=float("inf"))
    params = init_params(config, jax.random.key(0))
    params["blocks"]["integrator"]["gamma"] *= 0
    weights = interop.params_to_torch(params, config)
    torch.save({k: torch.from_numpy(np.array(v)) for k, v in weights.items()}, tmp_path / "w.pt")
    args = ["--weights", tmp_path / "w.pt", "--num_iterations", 3, "--out", tmp_path / "run"]
    code, _, err = run_script("import_torch.py", *args, "--tokenizer", "gpt2")
    assert code == 2 and "50257" in err and not (tmp_path / "run").exists()
    code, _, err = run_script("import_torch.py", *args, "--tokenizer", "bytes")
    assert code == 0, err
    _, found = read_params(tmp_path / "run", config)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, found)
    assert run_script("import_torch.py", *args)[0] == 2, "an existing run must not be overwritten"
    (tmp_path / "junk.pt").write_bytes(b"junk")
    code, _, err = run_script(
        "import_torch.py",
        "--weights",
        tmp_path / "junk.pt",
        "--num_iterations",
        3,
        "--out",
        tmp_path / "no",
    )
    assert code == 2 and err.startswith("error: ")


def test_an_update_is_predicted_from_what_devices_send():
    scaling = runpy.run_path(str(SCRIPTS / "scaling.py"))
    shape = {"data": 64, "fsdp": 8, "tensor": 1}
    bandwidth = scaling["bandwidth"]
    assert bandwidth(("fsdp",), shape) == 450e9  # within a node
    assert bandwidth(("data",), shape) == 50e9  # one adapter for each ring
    assert bandwidth(("data", "fsdp"), shape) == 400e9  # eight
    assert bandwidth(("fsdp",), {"data": 1, "fsdp": 64, "tensor": 1}) == 400e9
    assert bandwidth(("tensor",), {"data": 8, "fsdp": 4, "tensor": 2}) == 450e9
    assert bandwidth(("fsdp",), {"data": 1, "fsdp": 16, "tensor": 4}) == 100e9

    done = subprocess.run(
        [
            sys.executable,
            SCRIPTS / "scaling.py",
            "--config",
            "tiny",
            "--meshes",
            "1x1x1",
            "1x2x1",
            "--compile",
            "cpu",
            "--json",
            "--model.num_layers",
            "2",
        ],
        env=os.environ | {"PYTHONPATH": str(SCRIPTS.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    alone, pair = json.loads(done.stdout)["rows"]
    assert alone["sent, GB"] == 0 and alone["of linear"] == [1, 1]
    assert pair["computing, s"] == alone["computing, s"] / 2
    assert pair["update, s"] == [
        max(pair["computing, s"], pair["exchanging, s"]),
        pair["computing, s"] + pair["exchanging, s"],
    ]
    assert pair["sent, GB"] > 0
