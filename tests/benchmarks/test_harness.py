"""The benchmarks on shapes of seconds: what they count is right, and what they time is there."""

import dataclasses
import importlib
import json
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from inl_jax.config_file import load_config

FOLDER = Path(__file__).parents[2] / "benchmarks"
TINY = (
    "--config tiny --model.d_model 16 --model.d_ff 32 --model.num_layers 2 "
    "--model.num_iterations 4 --model.vocab_size 300 --data.seq_len 16 --model.max_seq_len 32 "
    "--model.controller_width 8 --batch_size 2 --mesh.data 1"
).split()


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a file of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(FOLDER)
    harness = importlib.import_module("harness")
    monkeypatch.setattr(harness, "MATMUL", (8, 16, 32))
    monkeypatch.setattr(harness, "PAUSE", 0.0)
    return importlib.import_module


@pytest.fixture
def measure(benchmark, capsys):
    """Runs a benchmark with --json; returns the object, which must be all of stdout."""

    def run(name, *args):
        benchmark("harness").main(getattr(benchmark(name), name), [*args, "--json"])
        found = json.loads(capsys.readouterr().out)
        assert found["command"].startswith(f"python benchmarks/{name}.py {args[0]}")
        assert f"jax {jax.__version__}" in found["machine"]
        return found

    return run


SMALL = "--d_model 16 --d_ff 32 --num_iterations 3 --tokens 8 --rounds 2 --skip_compile".split()


@pytest.mark.slow
def test_integrator_and_block_are_timed_beside_torch(measure):
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


@pytest.mark.slow
def test_integrator_without_torch_says_so_in_its_rows(measure, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "torch_reference", raising=False)
    found = measure("integrator", *SMALL)
    assert found["torch"] == "not installed" and found["block_speedup_vs_plain_scan"] > 0
    assert not any("torch_" in name for name in found)
    notes = [row["note"] for row in found["rows"] if row["contender"] == "torch eager"]
    assert notes == ["torch not installed"] * 4


@pytest.mark.slow
def test_train_measures_updates_of_a_config(measure):
    found = measure("train", *TINY, "--updates", "2", "--warmup", "1")
    assert found["compile_seconds"] > 0 and "integrator_tax" not in found
    assert found["share_of_matmul"] > 0 and found["peak_bytes"] > 1e6
    per_update = found["tokens_per_second"] * found["seconds_per_update"]
    np.testing.assert_allclose(per_update, 2 * 16)


def test_train_divides_by_the_time_without_the_integrator(measure, benchmark, monkeypatch):
    def training(config, flags):
        T = config.model.num_iterations
        return {"num_iterations": T, "seconds_per_update": 1.0 + T}

    monkeypatch.setattr(benchmark("train"), "training", training)
    found = measure("train", *TINY, "--tax")
    assert [row["num_iterations"] for row in found["rows"]] == [4, 0]
    assert found["integrator_tax"] == 5


@pytest.mark.slow
def test_train_measures_a_config_with_and_without_the_integrator(measure):
    found = measure("train", *TINY, "--updates", "2", "--warmup", "1", "--tax")
    assert [row["num_iterations"] for row in found["rows"]] == [4, 0]
    assert found["integrator_tax"] > 0 and found["compile_seconds"] > 0


@pytest.mark.slow
def test_generate_measures_each_batch_size_and_position_once(measure):
    sizes = "--batch_sizes 3 --positions 5 99 100 --new_tokens 4 --rounds 1".split()
    rows = measure("generate", *TINY, "--model.context", "mean", *sizes)["rows"]
    assert [(r["batch_size"], r["position"]) for r in rows] == [(3, 5), (3, 28)]
    assert all(
        r[f"{w}_tokens_per_second"] > 0 for r in rows for w in ("prefill", "decode", "streamed")
    )


@pytest.mark.slow
def test_memory_measures_a_block_and_the_training_step(measure):
    found = measure("memory", *TINY, "--step")
    assert (found["segment"], found["chunk"]) == (7, 2048)
    widths = [found[f"residual_widths{k}"] for k in ("_segmented", "", "_autodiff")]
    assert widths == sorted(widths) and widths[0] > 0
    assert 0 < found["temp_bytes"] < found["temp_bytes_autodiff"]
    assert found["temp_bytes_segmented"] > 0 and found["temp_bytes_whole"] > 0
    assert 0 < found["step_alias_bytes"] <= found["step_argument_bytes"]
    assert found["step_temp_bytes"] > 0 and found["step_compile_seconds"] > 0


@pytest.mark.slow
def test_step_memory_counts_a_donated_state(benchmark):
    config = load_config("tiny", TINY[2:])
    found = benchmark("memory").step_memory(config)
    assert 0 < found["step_alias_bytes"] <= found["step_argument_bytes"]
    assert found["step_temp_bytes"] > 0 and found["step_compile_seconds"] > 0


def test_residual_widths_are_as_counted_by_hand(benchmark):
    """Counted: x and v of 14 iterations, hidden activations and rms of 15, h and x."""
    residual_widths, config = benchmark("memory").residual_widths, load_config("3b")
    widths = residual_widths(config.model, config.data.seq_len)
    np.testing.assert_allclose(widths * 15 * 2048, 14 * 2 * 2048 + 15 * (256 + 1) + 2 * 2048)
    segmented = dataclasses.replace(config.model, integrator_segment=7)
    assert widths <= 2.2 and residual_widths(segmented, 512) <= 0.7
    autodiff = dataclasses.replace(config.model, integrator_gradient="autodiff")
    assert residual_widths(autodiff, 512) > 10


@pytest.mark.slow  # compiles, allocates nothing
def test_memory_of_a_3b_blocks_gradient_is_a_fifth_of_autodiffs(measure):
    found = measure("memory", "--config", "3b")
    assert 5 * found["temp_bytes"] <= found["temp_bytes_autodiff"]


@pytest.mark.slow
def test_memory_estimate_has_a_row_for_each_remat(measure, benchmark, monkeypatch):
    module = benchmark("memory_estimate")
    program = types.SimpleNamespace(memory=None)
    monkeypatch.setattr(module, "use_no_device", lambda compiler: None)
    monkeypatch.setattr(module, "compile_abstractly", lambda *_: program)
    monkeypatch.setattr(module, "compiled_bytes", lambda memory: (2**20, 0))
    rows = measure("memory_estimate", *TINY, "--sequences", "1")["rows"]
    remats = ["none", "integrator", "all_but_integrator", "block"]
    assert [row["remat"] for row in rows] == remats
    assert all(row["ratio"] == row["estimated_bytes"] / 2**20 > 0 for row in rows)


@pytest.mark.slow
def test_remat_compares_each_setting_with_the_first(measure, benchmark, monkeypatch):
    remat = benchmark("remat")
    assert len(remat.REMATS) == 7
    monkeypatch.setattr(remat, "REMATS", remat.REMATS[::6])
    rows = measure("remat", *TINY, "--layers", "1", "--tokens", "16", "--rounds", "1")["rows"]
    settings = [(row["remat"], row["gradient"]) for row in rows]
    assert settings == [("none", "lean"), ("none", "autodiff")]
    assert rows[0]["memory_over_none"] == 1 and rows[1]["memory_over_none"] > 1
    assert all(row["temp_bytes"] > 0 and row["time_over_none"] > 0 for row in rows)


@pytest.mark.slow
def test_depth_measures_iterations_and_tols_of_a_run(measure, trained):
    small = "--tols 1e-9 99 --sequences 4 --new_tokens 2 --rounds 1".split()
    rows = measure("depth", str(trained[1]), *small)["rows"]
    assert [r["iterations"] for r in rows] == [0, 1, 2, 3, 5, 3, 3]
    assert [r["steps_per_token"] for r in rows] == [0, 1, 2, 3, 5, 3, 1]
    bits = [r["bits_per_byte"] for r in rows]
    np.testing.assert_allclose(bits[5:], [bits[3], bits[1]], rtol=1e-6)
    assert rows[3]["evaluation_time"] == rows[3]["decode_time"] == 1
    assert rows[1]["steps_saved"] == 1 - 1 / 3


def test_depths_of_a_model_that_needs_an_iteration_begin_at_1(benchmark, model_config):
    models = benchmark("depth").depths(model_config(context="mean"), [0.5])
    found = [(m.num_iterations, m.tol) for m in models]
    assert found == [(1, 0), (2, 0), (3, 0), (5, 0), (3, 0.5)]


@pytest.mark.slow
def test_long_context_measures_positions_beyond_the_longest_sequence(measure, trained):
    rows = measure("long_context", str(trained[1]), "--times", "3", "--sequences", "4")["rows"]
    assert [r["positions"] for r in rows] == ["0 to 31", "32 to 63", "64 to 95"]
    assert [r["tokens"] for r in rows] == [128, 128, 128]
    first, *later = rows
    np.testing.assert_allclose(first["bits_per_byte"], first["started_afresh"], rtol=1e-5)
    assert all(abs(r["bits_per_byte"] - r["started_afresh"]) > 1e-3 for r in later)


def test_ranges_of_positions_double_up_to_the_end(benchmark):
    edges = benchmark("long_context").edges
    assert edges(256, 8) == [0, 256, 512, 1024, 2048] and edges(4, 3) == [0, 4, 8, 12]


@pytest.mark.slow
def test_exported_decoding_times_a_token_at_two_positions(measure):
    for package in ("torch", "transformers"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    small = "--positions 4 16 --new_tokens 2 --rounds 1".split()
    rows = measure("exported_decoding", *TINY, *small)["rows"]
    assert [row["context"] for row in rows] == ["decay", "attention"]
    assert all(row["ms_at_4"] > 0 for row in rows)
    later = [row["ratio"] * row["ms_at_4"] for row in rows]
    np.testing.assert_allclose(later, [row["ms_at_16"] for row in rows])


def test_loss_in_chunks_takes_less_memory(measure):
    sizes = "--d_model 8 --vocab_size 999 --tokens 256 --chunk 8 --rounds 1".split()
    found = measure("loss", *sizes)
    whole, chunked = found["rows"]
    assert (whole["loss"], chunked["loss"]) == ("at once", "in chunks")
    assert found["loss_memory_ratio"] == whole["temp_bytes"] / chunked["temp_bytes"] > 5
    assert whole["time_over_at_once"] == 1
    assert found["loss_time_ratio"] == chunked["time_over_at_once"] > 0


def test_interleaved_contenders_take_turns(benchmark):
    calls, harness = [], benchmark("harness")
    contenders = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    seconds = harness.interleaved(contenders, 3)
    assert "".join(calls) == "ab" + "ababab" and [len(s) for s in seconds.values()] == [3, 3]
    assert harness.ratios([2, 3, 8], [1, 3, 2]) == (2, 1, 4)


def test_main_prints_a_table_with_its_command_and_machine(benchmark, capsys, monkeypatch):
    memory = benchmark("memory")
    monkeypatch.setattr(memory, "block_temp_bytes", lambda model, seq_len: 3 * 2**19)
    benchmark("harness").main(memory.memory, [*TINY, "--model.integrator_segment", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("python benchmarks/memory.py --config tiny")
    assert f"jax {jax.__version__}" in lines[1] and "segments of 2 iterations" in lines[-2]
    assert any(
        line.startswith("temp_bytes_autodiff") and line.endswith("1.5 MiB") for line in lines
    )


@pytest.mark.parametrize(
    ("name", "args", "named"),
    [
        ("integrator", ["--tokens", "0"], "--tokens 0: must be positive"),
        ("integrator", ["--tok", "8"], "--tok: no such flag; the closest is --tokens"),
        ("generate", [*TINY, "--new_tokens", "32"], "model.max_seq_len=32"),
        ("memory", [*TINY, "--model.num_iterations", "0"], "there is no integrator"),
        ("train", [*TINY, "--model.d_modl", "3"], "d_modl"),
        ("train", [*TINY, "--update", "3"], "--update"),
    ],
)
def test_main_answers_a_mistake_with_one_line_and_exit_code_2(benchmark, capsys, name, args, named):
    with pytest.raises(SystemExit) as stop:
        benchmark("harness").main(getattr(benchmark(name), name), args)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and named in err


@pytest.mark.parametrize("name", ["integrator", "loss", "memory"])
def test_main_prints_what_a_benchmark_answers_for_help(benchmark, capsys, name):
    module = benchmark(name)
    with pytest.raises(SystemExit) as stop:
        benchmark("harness").main(getattr(module, name), ["--help"])
    assert not stop.value.code and module.__doc__.splitlines()[0] in capsys.readouterr().out
