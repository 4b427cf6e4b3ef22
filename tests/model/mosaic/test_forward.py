import os
import re
import subprocess
import sys

import jax.numpy as jnp
import pytest
from mosaic_cases import C, Q, arrays, bfloat16, distance

from inl_jax.model.dynamics import step
from inl_jax.model.mosaic.forward import State, Weights, bytes_moved, bytes_read_again, iteration
from inl_jax.model.mosaic.tiles import interpreted

SLOW = pytest.mark.slow
INF = float("inf")


def both(tokens, width, *, kappa=1.0, first=False):
    """(x', v', r', rms') of the kernel and of `dynamics.step`."""
    params, context, x, s = arrays(tokens, width, num_iterations=2)
    v = None if first else jnp.flip(x, axis=-1)
    dynamics = bfloat16(kappa)
    (new_x, new_v), (r, rms) = step(params, context, x, v, s[0], dynamics=dynamics)
    _, (new_r, new_rms) = step(params, context, new_x, new_v, s[1], dynamics=dynamics)

    def hidden(a):
        return a.astype(dynamics.dtype).reshape(tokens, Q * C)

    state = State(x[0], None if first else v[0], hidden(r), rms[0, :, 0])
    weights = Weights(
        params["output_kernel"].astype(dynamics.dtype),
        params["state_kernel"].astype(dynamics.dtype).reshape(2, width, Q * C),
        params["output_bias"],
        params["mu"],
        hidden(context),
    )
    with interpreted():
        found = iteration(state, weights, s[0], dynamics=dynamics)
    return found, State(new_x[0], new_v[0], hidden(new_r), new_rms[0, :, 0])


@SLOW
@pytest.mark.parametrize(
    "tokens, width, kappa, first",
    [
        (64, 32, 1.0, True),
        (64, 64, 1.0, False),
        (64, 64, INF, True),
        (64, 96, 0.3, True),
        (192, 128, INF, False),
        (128, 256, 1.0, False),
    ],
)
def test_iteration_is_a_step_within_the_rounding_of_its_products(tokens, width, kappa, first):
    found, wanted = both(tokens, width, kappa=kappa, first=first)
    assert distance(found.x_ND, wanted.x_ND) < 2e-4
    assert distance(found.v_ND, wanted.v_ND) < 2e-3
    assert distance(found.r_NH, wanted.r_NH) < 1e-2
    assert distance(found.rms_N, wanted.rms_N) < 1e-4


def test_iteration_moves_at_most_40_kb_per_token():
    N, D = 4 * 4096, 2048
    state = 2 * 2 * 4 * D  # x and v in float32, in and out
    assert state * N < bytes_moved(N, D) <= 40_000 * N


def test_each_program_of_an_iteration_reads_the_weights():
    D, vectors = 2048, 6 * 4 * 2048
    weights = 2 * 3 * Q * C * D + vectors
    assert [bytes_read_again(n * 64, D) for n in (1, 2, 256)] == [0, weights, 255 * weights]


COMPILE = """
import jax
from inl_jax.model.dynamics import Dynamics
from inl_jax.model.mosaic import forward
from inl_jax.planning.programs.xla import compile_for_cuda
state, weights, s_D = forward.specs(8192, 2048)
for kappa in (1.0, float("inf")):
    dynamics = Dynamics(0.1, kappa, forward.BF16)
    for v in (state.v_ND, None):
        function = lambda *arrays: forward.iteration(*arrays, dynamics=dynamics)
        compile_for_cuda(jax.jit(function).trace(state._replace(v_ND=v), weights, s_D), 1)
"""


@SLOW
def test_iteration_fits_into_the_registers_of_a_hopper(tmp_path):
    """Of the first iteration and a later one, for every kappa, as ptxas says."""
    pytest.importorskip("jax_cuda12_plugin", reason="make test-cuda installs XLA's CUDA compiler")
    environment = os.environ | {
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "MOSAIC_GPU_DUMP_TO": str(tmp_path),
    }
    subprocess.run([sys.executable, "-c", COMPILE], env=environment, check=True)
    reports = [path.read_text() for path in tmp_path.glob("*.ptxas")]
    assert len(reports) == 4
    for report in reports:
        assert re.search(r"\b0 bytes spill stores, 0 bytes spill loads", report), report
