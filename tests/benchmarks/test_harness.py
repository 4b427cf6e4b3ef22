"""The benchmarks, on shapes of seconds: what they count is right, what they time is there."""

import dataclasses
import functools
import importlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from inl_jax.config_file import load_config
from inl_jax.model.language_model import init_params

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
TINY = [
    "--config",
    "tiny",
    "--model.d_model",
    "16",
    "--model.d_ff",
    "32",
    "--model.num_layers",
    "2",
    "--model.num_iterations",
    "4",
    "--model.vocab_size",
    "300",
    "--data.seq_len",
    "16",
    "--model.max_seq_len",
    "32",
    "--model.controller_width",
    "8",
    "--batch_size",
    "2",
    "--mesh.data",
    "1",
]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    module = importlib.import_module("harness")
    monkeypatch.setattr(module, "MATMUL", (8, 16, 32))
    monkeypatch.setattr(module, "PAUSE", 0.0)
    return module


@pytest.fixture
def measure(benchmark, capsys):
    """Runs a verb with --json; returns the object, which must be all of stdout."""

    def run(*args):
        benchmark.main([*args, "--json"])
        found = json.loads(capsys.readouterr().out)
        assert found["command"].startswith(f"python benchmarks/harness.py {args[0]}")
        assert f"jax {jax.__version__}" in found["machine"]
        return found

    return run


SMALL = ["--d_model", "16", "--d_ff", "32", "--num_iterations", "3", "--tokens", "8"]
SMALL += ["--rounds", "2", "--skip_compile"]


def test_integrator_and_block_beside_torch(measure):
    pytest.importorskip("torch", reason="torch is not installed")
    found = measure("integrator", *SMALL)
    for piece in ("integrator", "block"):
        for other in ("torch_eager", "plain_scan"):
            key = f"{piece}_speedup_vs_{other}"
            assert 0 < found[f"{key}_min"] <= found[key] <= found[f"{key}_max"]
    assert found["matmul_gflops"] > 0 and found["matmul_torch_gflops"] > 0
    assert "block_speedup_vs_torch_compile" not in found
    flops = 3 * 8 * (2 * 16 * 16 + 2 * 16 * 256 * 9 + 4 * 16 * 32)  # context, controllers, MLP
    bound = flops / (1e9 * found["matmul_gflops"])
    np.testing.assert_allclose(found["block_arithmetic_seconds"], bound)
    ours = [r for r in found["rows"] if r["contender"] == "ours"][-1]
    assert (ours["piece"], ours["what"]) == ("block", "forward+backward")
    times = found["block_times_arithmetic_bound"]
    np.testing.assert_allclose(times * bound, ours["median_ms"] / 1000)


def test_without_torch_its_rows_say_so(measure, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "torch_reference", raising=False)
    found = measure("integrator", *SMALL)
    assert found["torch"] == "not installed" and found["block_speedup_vs_plain_scan"] > 0
    assert not any("torch_" in name for name in found)
    notes = [row["note"] for row in found["rows"] if row["contender"] == "torch eager"]
    assert notes == ["torch not installed"] * 4


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
def test_torch_computes_what_we_compute(benchmark, model_config, dtype, tolerance):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    reference = importlib.import_module("torch_reference")
    config = model_config(
        context="mean", num_layers=1, param_dtype=dtype, compute_dtype=dtype, num_iterations=4
    )
    with jax.enable_x64(dtype == "float64"):
        params = init_params(config, jax.random.key(0))
        # Away from the special values at the start: zeros, and equal coefficients.
        keys = iter(jax.random.split(jax.random.key(1), 100))
        params = jax.tree.map(
            lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape, p.dtype), params
        )
        block = jax.tree.map(lambda p: p[0], params["blocks"])
        x, dy = jax.random.normal(next(keys), (2, 2, 9, config.d_model), dtype)
        function = benchmark.with_gradient(benchmark.block_fn(config))
        y, (grads, dx) = jax.jit(function)(dy, block, x)
        theirs = reference.load_block(params, config)
        tensor = torch.tensor(np.array(x), requires_grad=True)
        out = theirs(tensor)
        out.backward(torch.tensor(np.array(dy)))
        compare = functools.partial(np.testing.assert_allclose, atol=tolerance, rtol=tolerance)
        compare(out.detach(), y)
        compare(tensor.grad, dx)
        grads = params | {"blocks": jax.tree.map(lambda g: g[None], grads)}
        ours = reference.block_weights(grads, config)
        assert len(ours) == len(list(theirs.parameters())) == 29
        for name, parameter in theirs.named_parameters():
            compare(parameter.grad, ours[name], err_msg=name)


def test_train(measure):
    found = measure("train", *TINY, "--updates", "2", "--warmup", "1", "--tax")
    assert [row["num_iterations"] for row in found["rows"]] == [4, 0]
    assert found["integrator_tax"] > 0 and found["compile_seconds"] > 0
    assert found["share_of_matmul"] > 0 and found["peak_bytes"] > 1e6
    per_update = found["tokens_per_second"] * found["seconds_per_update"]
    np.testing.assert_allclose(per_update, 2 * 16)


def test_generate(measure):
    found = measure(
        "generate",
        *TINY,
        "--batch_sizes",
        "3",
        "--positions",
        "5",
        "99",
        "100",
        "--new_tokens",
        "4",
        "--rounds",
        "1",
    )
    rows = found["rows"]
    assert [(r["batch_size"], r["position"]) for r in rows] == [(3, 5), (3, 28)]
    assert all(r[f"{w}_tokens_per_second"] > 0 for r in rows for w in ("prefill", "decode"))


@pytest.mark.slow
def test_memory(measure):
    found = measure("memory", *TINY, "--step")
    assert (found["segment"], found["chunk"]) == (7, 2048)
    widths = [found[f"residual_widths{k}"] for k in ("_segmented", "", "_autodiff")]
    assert widths == sorted(widths) and widths[0] > 0
    assert 0 < found["temp_bytes"] < found["temp_bytes_autodiff"]
    assert found["temp_bytes_segmented"] > 0 and found["temp_bytes_whole"] > 0
    assert 0 < found["step_alias_bytes"] <= found["step_argument_bytes"]
    assert found["step_temp_bytes"] > 0 and found["step_compile_seconds"] > 0


def test_what_the_gradient_keeps_at_full_width(benchmark):
    """Counted by hand: x and v of 14 iterations, hidden activations and rms of 15, h and x."""
    config = load_config("3b")
    widths = benchmark.residual_widths(config.model, config.data.seq_len)
    np.testing.assert_allclose(widths * 15 * 2048, 14 * 2 * 2048 + 15 * (256 + 1) + 2 * 2048)
    segmented = dataclasses.replace(config.model, integrator_segment=7)
    assert widths <= 2.2 and benchmark.residual_widths(segmented, 512) <= 0.7
    autodiff = dataclasses.replace(config.model, integrator_gradient="autodiff")
    assert benchmark.residual_widths(autodiff, 512) > 10


@pytest.mark.slow  # compiles, allocates nothing
def test_the_gradient_of_a_3b_block_takes_a_fifth_of_autodiffs_memory(measure):
    found = measure("memory", "--config", "3b")
    assert 5 * found["temp_bytes"] <= found["temp_bytes_autodiff"]


@pytest.mark.slow
def test_remat(measure, benchmark, monkeypatch):
    assert len(benchmark.REMATS) == 7
    monkeypatch.setattr(benchmark, "REMATS", benchmark.REMATS[::6])
    rows = measure("remat", *TINY, "--layers", "1", "--tokens", "16", "--rounds", "1")["rows"]
    settings = [(row["remat"], row["gradient"]) for row in rows]
    assert settings == [("none", "lean"), ("none", "autodiff")]
    assert rows[0]["memory_over_none"] == 1 and rows[1]["memory_over_none"] > 1
    assert all(row["temp_bytes"] > 0 and row["time_over_none"] > 0 for row in rows)


def test_loss(measure):
    sizes = ["--d_model", "8", "--vocab_size", "999", "--tokens", "256", "--chunk", "8"]
    found = measure("loss", *sizes, "--rounds", "1")
    whole, chunked = found["rows"]
    assert (whole["loss"], chunked["loss"]) == ("at once", "in chunks")
    assert found["loss_memory_ratio"] == whole["temp_bytes"] / chunked["temp_bytes"] > 5
    assert whole["time_over_at_once"] == 1
    assert found["loss_time_ratio"] == chunked["time_over_at_once"] > 0


def test_measurements_take_turns(benchmark):
    calls = []
    contenders = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    seconds = benchmark.interleaved(contenders, 3)
    assert "".join(calls) == "ab" + "ababab" and [len(s) for s in seconds.values()] == [3, 3]
    assert benchmark.ratios([2, 3, 8], [1, 3, 2]) == (2, 1, 4)


def test_a_table_is_printed_with_its_command_and_machine(benchmark, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "block_temp_bytes", lambda model, seq_len: 3 * 2**19)
    benchmark.main(["memory", *TINY, "--model.integrator_segment", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("python benchmarks/harness.py memory --config tiny")
    assert f"jax {jax.__version__}" in lines[1] and "segments of 2 iterations" in lines[-2]
    assert any(
        line.startswith("temp_bytes_autodiff") and line.endswith("1.5 MiB") for line in lines
    )


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["fly"], "fly: choose one of integrator, train"),
        (["integrator", "--tokens", "0"], "--tokens 0: must be positive"),
        (["generate", *TINY, "--new_tokens", "32"], "model.max_seq_len=32"),
        (["memory", *TINY, "--model.num_iterations", "0"], "there is no integrator"),
        (["train", *TINY, "--model.d_modl", "3"], "d_modl"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(benchmark, capsys, args, named):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(args)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and named in err
