import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from integrator_cases import F32, inputs

from inl_jax.config import ModelConfig
from inl_jax.model.dynamics import Dynamics, hidden_from_context, step
from inl_jax.model.dynamics_vjp import Loop, run_lean
from inl_jax.model.mosaic.backward import H, backward, bytes_moved, bytes_read_again
from inl_jax.model.mosaic.tiles import ROWS, WIDTH, Q, interpreted

SLOW = pytest.mark.slow
BF16 = jnp.dtype("bfloat16")


def arrays(*, tokens, width, num_iterations):
    """(params, from_context, x, s) of the integrator, and the gradient by its last state."""
    config = ModelConfig(d_model=width, controller_width=WIDTH, num_heads=1)
    params, h, x = inputs(config, F32, batch=1, positions=tokens)
    params["output_kernel"] *= 0.3
    from_context = hidden_from_context(params, h, dtype=BF16)
    key_s, key_dx = jax.random.split(jax.random.key(3))
    s = 0.1 * jax.random.normal(key_s, (num_iterations, width))
    names = ("mu", "state_kernel", "output_kernel", "output_bias")
    of_step = {name: params[name] for name in names}
    return (of_step, from_context, x, s), jax.random.normal(key_dx, x.shape)


@functools.partial(jax.jit, static_argnames="dynamics")
def xla_gradients(args, dx, dynamics):
    """By (params, what the context adds, x, s), of the XLA form."""
    params, from_context, x, s = args

    def run(params, from_context, x, s):
        return run_lean(params, from_context, x, s, dynamics, Loop())

    return jax.vjp(run, params, from_context.astype(dynamics.dtype), x, s)[1](dx)


def kernel_gradients(args, dx, dynamics):
    """The same of `backward`, which gets the states from the XLA form."""
    params, from_context, x, s = args
    N, D = x.shape[1:]
    xv, kept = (x, None), []
    cast = params | {n: params[n].astype(BF16) for n in ("state_kernel", "output_kernel")}
    for s_D in s:
        new, (r, rms) = step(cast, from_context, *xv, s_D, dynamics=dynamics)
        x_ND, v_ND = (None if a is None else a[0] for a in xv)
        kept.append((x_ND, v_ND, r.reshape(N, H), rms.reshape(N)))
        xv = new
    with interpreted():
        d_params, d_context, d_x, ds = backward(params, s, kept, dx[0], dynamics=dynamics)
    return d_params, d_context.reshape(from_context.shape), d_x[None], ds


def error(found, wanted):
    found, wanted = (np.asarray(a, np.float64) for a in (found, wanted))
    return np.linalg.norm(found - wanted) / (np.linalg.norm(wanted) or 1.0)


def check(args, dx, kappa):
    """The kernels' error beside float32 is at most about that of the XLA form in bfloat16."""
    exact = xla_gradients(args, dx, Dynamics(0.1, kappa, F32))
    rounded = xla_gradients(args, dx, Dynamics(0.1, kappa, BF16))
    found = jax.jit(functools.partial(kernel_gradients, dynamics=Dynamics(0.1, kappa, BF16)))(
        args, dx
    )
    named = jax.tree_util.tree_leaves_with_path(exact)
    leaves = zip(named, jax.tree.leaves(rounded), jax.tree.leaves(found), strict=True)
    for (path, wanted), xla, kernel in leaves:
        assert kernel.shape == wanted.shape
        allowed = 1.25 * error(xla, wanted) + 1e-3
        assert error(kernel, wanted) <= allowed, (jax.tree_util.keystr(path), allowed)
    return found


def test_backward_gives_every_input_a_gradient_of_its_shape():
    """Traced, not run."""
    N, D, T = 2 * ROWS, 32, 3
    array = jax.ShapeDtypeStruct
    params = {
        "mu": array((D,), F32),
        "state_kernel": array((2, D, Q, WIDTH), F32),
        "output_kernel": array((Q, WIDTH, D), F32),
        "output_bias": array((Q, D), F32),
    }
    s, x, r, rms = array((T, D), F32), array((N, D), F32), array((N, H), BF16), array((N,), F32)
    kept = [(x, x if t else None, r, rms) for t in range(T)]
    gradient = functools.partial(backward, dynamics=Dynamics(0.1, 1.0, BF16))
    assert jax.eval_shape(gradient, params, s, kept, x) == (params, r, x, s)


@SLOW
@pytest.mark.parametrize(
    "tokens, width, num_iterations, kappa",
    [
        (ROWS, 16, 2, 1.0),
        (ROWS, 64, 1, 1.0),
        (2 * ROWS, 96, 3, 0.3),
        (ROWS, 128, 4, float("inf")),
        (3 * ROWS, 64, 2, float("inf")),
        (ROWS, 64, 15, 1.0),
    ],
)
def test_backward_has_the_gradient_of_the_xla_form(tokens, width, num_iterations, kappa):
    args, dx = arrays(tokens=tokens, width=width, num_iterations=num_iterations)
    check(args, dx, kappa)


@SLOW
def test_backward_has_no_gradient_by_beta_beyond_its_bound():
    (params, *rest), dx = arrays(tokens=ROWS, width=64, num_iterations=3)
    params["output_bias"] = params["output_bias"].at[1].set(1e3)
    by_params, *_ = check((params, *rest), dx, kappa=1.0)
    assert not by_params["output_bias"][1].any() and by_params["output_bias"][0].all()


@SLOW
def test_backward_takes_nothing_from_tokens_without_a_gradient():
    """So a ragged count of tokens can be padded."""
    args, dx = arrays(tokens=2 * ROWS, width=64, num_iterations=3)
    tokens = ROWS + 7
    check(args, dx.at[:, tokens:].set(0), kappa=1.0)
    dynamics = Dynamics(0.1, 1.0, BF16)
    padded = kernel_gradients(args, dx.at[:, tokens:].set(0), dynamics)
    params, from_context, x, s = args
    other = x.at[:, tokens:].set(3.0)
    again = kernel_gradients((params, from_context, other, s), dx.at[:, tokens:].set(0), dynamics)
    for a, b in zip(jax.tree.leaves(padded), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_backward_moves_less_than_seventy_kilobytes_of_a_token():
    """At the 3b's width; what XLA's products move beside it is 38."""
    many = 1 << 20  # so that the weights, read once, weigh nothing
    assert 66 < bytes_moved(many, 2048) / many / 1000 < 70


def test_each_program_of_the_gradient_reads_the_weights_and_one_of_them_twice():
    D, vectors = 2048, 6 * 4 * 2048
    weights = 2 * 4 * H * D + vectors
    assert [bytes_read_again(n * ROWS, D) for n in (1, 2)] == [0, weights]


COMPILE = """
import jax, jax.numpy as jnp
from inl_jax.internals import compile_for_topology
from inl_jax.model.dynamics import Dynamics
from inl_jax.model.mosaic.backward import H, WIDTH, Q, backward
from inl_jax.planning.hardware import XLA_H100
from inl_jax.planning.programs.xla import use_no_device

use_no_device("cuda")
T, N, D = 3, 256, 2048
array = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
params = {
    "mu": array(D),
    "state_kernel": array(2, D, Q, WIDTH),
    "output_kernel": array(Q, WIDTH, D),
    "output_bias": array(Q, D),
}
r = array(N, H, dtype=jnp.bfloat16)
kept = [(array(N, D), array(N, D) if t else None, r, array(N)) for t in range(T)]
for kappa in (1.0, float("inf")):
    gradient = lambda *a: backward(*a, dynamics=Dynamics(0.1, kappa, jnp.bfloat16))
    compile_for_topology(
        jax.jit(gradient).trace(params, array(T, D), kept, array(N, D)),
        platform="cuda",
        topology="1x1x1",
        target_config=XLA_H100,
        num_devices=1,
        options={},
    )
"""


@SLOW
def test_kernels_of_the_gradient_spill_no_register(tmp_path):
    """Of the last, a middle and the first iteration, for every kappa, as ptxas says."""
    pytest.importorskip("jax_plugins.xla_cuda12", reason="needs JAX's CUDA plugin")
    env = os.environ | {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_TO": str(tmp_path)}
    subprocess.run([sys.executable, "-c", COMPILE], env=env, check=True)
    reports = [path.read_text() for path in tmp_path.glob("*.ptxas")]
    assert len(reports) == 6
    for report in reports:
        assert re.search(r"\b0 bytes spill stores, 0 bytes spill loads", report), report
        assert int(re.search(r"Used (\d+) registers", report)[1]) <= 255
