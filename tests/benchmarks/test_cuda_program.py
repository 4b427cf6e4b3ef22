"""What XLA's CUDA compiler makes of the 3b's step, read without a GPU."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What `python benchmarks/cuda_program.py --config configs/3b.py --json` prints, at most. Lower them
# with the program that they hold.
AT_MOST = {
    "xla": {
        "us_per_token": 100,
        "kernels": 620_000,
        "kb_per_token_iteration_forward": 95,
        "kb_per_token_iteration_backward": 195,
        "device_bytes": 46e9,
    },
    "mosaic": {
        "us_per_token": 61,
        "us_per_token_with_l2": 66,
        "kernels": 220_000,
        "kb_per_token_iteration_forward": 40,
        "kb_per_token_iteration_backward": 110,
        "device_bytes": 44e9,
    },
    "no_integrator": {"us_per_token": 20.5, "kernels": 37_000, "device_bytes": 42e9},
}
HELD = [(variant, name) for variant, bounds in AT_MOST.items() for name in bounds]

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="JAX's CUDA plugin, whose compiler needs no GPU, is not installed",
)


@pytest.fixture(scope="module")
def program():
    """`program(*flags)`: the benchmark's JSON, of one process for each set of flags."""
    found = {}

    def of(*flags):
        if flags not in found:
            command = [sys.executable, "benchmarks/cuda_program.py", "--config", "configs/3b.py"]
            done = subprocess.run(
                [*command, "--json", *flags],
                cwd=ROOT,
                env={n: v for n, v in os.environ.items() if not n.startswith("JAX_")}
                | {"PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
            found[flags] = json.loads(done.stdout) | {"stderr": done.stderr}
        return found[flags]

    return of


@pytest.fixture
def module(monkeypatch):
    """Imports a file of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("variant, name", HELD)
def test_the_program_of_the_3b_stays_within_its_bounds(program, variant, name):
    values = program()[variant]
    assert values is not None, program()["stderr"]
    assert 0 < values[name] <= AT_MOST[variant][name]


@needs_compiler
@pytest.mark.slow
def test_attention_is_cudnns_in_both_directions(program):
    flags = "--model.context attention --model.num_layers 2 --model.num_iterations 1".split()
    flags += "--accumulate_steps 64 --model.remat block".split()
    for variant in ("xla", "no_integrator"):
        kinds = program(*flags)[variant]["kernels_by_kind"]
        layers = 2 * 64  # and micro-batches
        assert kinds["__cudnn$fmhaSoftmax"] == 2 * layers  # and once more for the gradient
        assert kinds["__cudnn$fmhaSoftmaxBackward"] == layers


@needs_compiler
@pytest.mark.slow
def test_no_kernel_of_the_integrator_spills(program):
    usages = program()["mosaic"]["ptxas"]
    assert len(usages) >= 2  # forward and backward
    for usage in usages:
        assert usage["registers"] <= 255 and usage["spilled_bytes"] == 0, usage


REPORTS = {
    "CUDA 12.8": """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'body_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for body_mosaic_gpu_kernel
    56 bytes stack frame, 56 bytes spill stores, 60 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers, 56 bytes cumulative stack size, 1 bytes smem
""",
    "CUDA 13": """ptxas info    : Compiling entry function 'body_mosaic_gpu_kernel' for 'sm_90a'
ptxas         .     112 bytes stack frame, 56 bytes spill stores, 60 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers, 17 bytes smem
info    : used 168 registers, used 2 barriers, 112 stack, 1025 bytes smem, 0 bytes lmem
""",
}


@pytest.mark.parametrize("text", REPORTS.values(), ids=REPORTS.keys())
def test_a_report_of_ptxas_gives_registers_and_spills(module, text):
    assert module("ptxas").read_report(text) == ("body_mosaic_gpu_kernel", 168, 56 + 60)


def kernel(hlo, op_name, num_bytes, times=1, flops=0, again=0):
    return hlo.Kernel("k", "kLoop", op_name, (hlo.Loop("w", times),), num_bytes, 0, flops, again)


def test_kernels_take_as_long_as_their_bytes_or_their_products(module):
    least_seconds, hlo = module("cuda_program").least_seconds, module("hlo")
    assert least_seconds(kernel(hlo, "", 3_000_000)) == pytest.approx(1e-6)
    assert least_seconds(kernel(hlo, "", 3_000_000, flops=1580 * 10**6)) == pytest.approx(2e-6)


def test_what_a_kernel_reads_again_passes_the_l2_cache_alone(module):
    cuda_program, hlo = module("cuda_program"), module("hlo")
    of_weights = kernel(hlo, "", 1_000_000, again=10_000_000)
    assert cuda_program.least_seconds(of_weights) == pytest.approx(1 / 3 * 1e-6)
    assert cuda_program.l2_seconds(of_weights) == pytest.approx(2e-6)


def test_forward_is_the_mean_of_both_passes_and_backward_of_one(module, train_config):
    cuda_program, hlo = module("cuda_program"), module("hlo")
    config = train_config(model={"num_layers": 2, "num_iterations": 3})
    units = config.batch_size * config.data.seq_len * 2 * 3
    found = [
        kernel(hlo, "jvp(integrator_forward)/add", 1000, times=units),
        kernel(hlo, "rematted_computation/integrator_forward/add", 3000, times=units),
        kernel(hlo, "transpose(jvp(integrator_forward))/integrator_backward/mul", 7000, units),
        kernel(hlo, "blocks/add", 9999, times=units),
    ]
    per_iteration = {
        which: cuda_program.kb_per_token_iteration(config, found, which)
        for which in ("forward", "backward")
    }
    assert per_iteration == {"forward": 2, "backward": 7}
    assert cuda_program.kb_per_token_iteration(config, found[3:], "forward") is None
