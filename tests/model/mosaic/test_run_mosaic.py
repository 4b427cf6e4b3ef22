import functools
import os
import subprocess
import sys
from pathlib import Path

import integrator_cases
import jax
import jax.numpy as jnp
import pytest
from conftest import mesh_of
from integrator_cases import F32, F64, layer_params
from mosaic_cases import BF16, C, arrays, bfloat16, distance

from inl_jax.config import InputError, ModelConfig
from inl_jax.model.dynamics_vjp import TRAJECTORY, Loop, run_lean
from inl_jax.model.mosaic.run_mosaic import integrator_kernel, run_mosaic
from inl_jax.model.mosaic.tiles import interpreted
from inl_jax.model.platform.device import H100, Device, made_for
from inl_jax.parallel import sharding

ROOT = Path(__file__).parents[3]
SLOW = pytest.mark.slow
INF = float("inf")
# What the gradient of a layer finds kept.
POLICIES = {
    "nothing": None,
    "the trajectory": jax.checkpoint_policies.save_only_these_names(TRAJECTORY),
}


def value_and_gradients(run, arguments):
    def loss(*arguments):
        x = run(*arguments)
        return jnp.sum(x * jnp.sin(jnp.arange(x.size).reshape(x.shape))), x

    (_, x), gradients = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(*arguments)
    return x, gradients


def mosaic(dynamics):
    return lambda *arguments: run_mosaic(*arguments, dynamics)


def xla(dynamics):
    return lambda *arguments: run_lean(*arguments, dynamics, Loop())


def assert_as_near(found, wanted, exact):
    """Each leaf is as near to float32 as XLA's form in bfloat16, but for the luck of rounding."""

    def check(path, found, wanted, exact):
        error = distance(found, exact), distance(wanted, exact)
        assert error[0] <= 2 * error[1] + 1e-6, (jax.tree_util.keystr(path), error)

    jax.tree_util.tree_map_with_path(check, found, wanted, exact)


@SLOW
@pytest.mark.parametrize(
    "rows, tokens, width, T, kappa",
    [(1, 65, 32, 2, 1.0), (1, 64, 64, 1, INF), (2, 50, 96, 3, 0.3), (3, 1, 64, 2, INF)],
)
def test_run_mosaic_is_run_lean_within_bfloat16(rows, tokens, width, T, kappa):
    """Also with tokens that fill no program, and with a first step alone."""
    params, context, x, s = arrays(tokens, width, rows=rows, num_iterations=T)
    narrow, wide = bfloat16(kappa), bfloat16(kappa)._replace(dtype=jnp.dtype("float32"))
    wanted = value_and_gradients(xla(narrow), (params, context, x, s))
    exact = value_and_gradients(xla(wide), (params, context.astype(wide.dtype), x, s))
    with interpreted():
        by_kernels = jax.jit(functools.partial(value_and_gradients, mosaic(narrow)))
        assert_as_near(by_kernels((params, context, x, s)), wanted, exact)


def gradient_errors(tokens, width, num_iterations):
    """How far each gradient is off in bfloat16, beside float64: by XLA's form, by the kernels."""
    config = ModelConfig(d_model=width, controller_width=C, num_heads=1)
    params = layer_params(config, scale=0.05)
    h, x = jax.random.normal(jax.random.key(5), (2, 1, tokens, width))

    def gradients(dtype, wide, **options):
        arrays = jax.tree.map(lambda a: a.astype(wide), (params, h, x))
        found = integrator_cases.value_and_gradients(
            *arrays, dtype=dtype, num_iterations=num_iterations, **options
        )
        return dict(zip(("parameters", "h", "x", "amplitude"), found[1], strict=True))

    with jax.enable_x64(True):
        exact = jax.tree.map(lambda a: a.astype(F32), gradients(F64, F64))
    by_xla = jax.tree.map(distance, gradients(BF16, F32), exact)
    with interpreted():
        by_kernels = gradients(BF16, F32, kernel="mosaic")
    return jax.tree.map(lambda *errors: errors, by_xla, jax.tree.map(distance, by_kernels, exact))


@SLOW
def test_gradients_by_the_kernels_are_as_near_to_float64_as_those_by_xla():
    errors = gradient_errors(tokens=200, width=128, num_iterations=3)
    errors.pop("amplitude")  # one number, which cancels: its error is luck
    for path, (by_xla, by_kernels) in jax.tree_util.tree_leaves_with_path(
        errors, is_leaf=lambda a: isinstance(a, tuple)
    ):
        assert by_kernels <= 1.5 * by_xla, (jax.tree_util.keystr(path), by_xla, by_kernels)


def layers_gradient(run, context, *, policy):
    """The gradient of two layers in a scan, as a function; and its arguments."""
    params, _, x, s = arrays(64, 32, num_iterations=2)
    layers = jax.tree.map(lambda p: jnp.stack([p, 0.9 * p]), params)

    def layer(x, params):
        return run(params, context, x, s), None

    def total(layers, x):
        body = layer if policy == "keep all" else jax.checkpoint(layer, policy=policy)
        return jax.lax.scan(body, x, layers)[0].sum()

    return jax.grad(total, (0, 1)), (layers, x)


def check_layers(*, policy, on_host):
    def gradients(run, context):
        function, arguments = layers_gradient(run, context, policy=policy)
        return jax.jit(function)(*arguments)

    context = arrays(64, 32)[1]
    wide = bfloat16()._replace(dtype=jnp.dtype("float32"))
    exact = gradients(xla(wide), context.astype(wide.dtype))
    wanted = gradients(xla(bfloat16()), context)
    with interpreted(on_host=on_host):
        assert_as_near(gradients(mosaic(bfloat16()), context), wanted, exact)


@SLOW
def test_run_mosaic_works_in_a_scan_over_layers():
    check_layers(policy="keep all", on_host=False)


def alone(code):
    """What a process of its own prints, in which XLA has threads for many calls to the host."""
    paths = map(str, (ROOT, ROOT / "tests", Path(__file__).parent))
    environment = os.environ | {
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "NPROC": "32",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@SLOW
@pytest.mark.parametrize("kept", POLICIES)
def test_run_mosaic_works_if_the_gradient_recomputes_layers(kept):
    alone(f"import test_run_mosaic as t; t.check_layers(policy=t.POLICIES[{kept!r}], on_host=True)")


COMPILE = """
import jax
from mosaic_cases import arrays, bfloat16
from test_run_mosaic import POLICIES, layers_gradient, mosaic
from inl_jax.planning.programs.xla import compile_for_cuda
for policy in POLICIES.values():
    function, arguments = layers_gradient(mosaic(bfloat16()), arrays(64, 32)[1], policy=policy)
    text = compile_for_cuda(jax.jit(function).trace(*arguments), 1).text
    print(text.count('custom_call_target="mosaic_gpu'))
"""


@SLOW
def test_run_mosaic_under_remat_runs_a_kernel_again_unless_the_trajectory_is_kept():
    """As compiled for a GPU."""
    pytest.importorskip("jax_cuda12_plugin", reason="make test-cuda installs XLA's CUDA compiler")
    kernels = alone(COMPILE)
    # Two iterations and two back; the second need not run again: nothing reads the last state.
    assert kernels.split() == ["5", "4"]


def of_each_row(run):
    """`run`, of each row alone, as `integrate` calls it on a mesh."""

    def of_rows(params, context, x, s):
        return jax.vmap(lambda c, x: run(params, c[None], x[None], s)[0])(context, x)

    return of_rows


def check_mesh():
    params, context, x, s = arguments = arrays(40, 32, num_iterations=2, rows=8)
    wide = bfloat16()._replace(dtype=jnp.dtype("float32"))
    wanted = value_and_gradients(xla(bfloat16()), arguments)
    exact = value_and_gradients(xla(wide), (params, context.astype(wide.dtype), x, s))
    on_mesh = jax.jit(functools.partial(value_and_gradients, of_each_row(mosaic(bfloat16()))))
    with sharding.on(mesh_of(data=8)), interpreted(on_host=True):
        found = on_mesh(arguments)
    assert found[0].sharding.shard_shape(x.shape) == (1, *x.shape[1:])
    assert_as_near(found, wanted, exact)


@SLOW
def test_run_mosaic_on_a_mesh_is_run_lean_within_bfloat16():
    alone("from test_run_mosaic import check_mesh; check_mesh()")


def test_run_mosaic_on_a_mesh_calls_a_kernel_for_each_device_with_its_rows():
    """Traced, not run."""
    params, context, x, s = arrays(64, 32, num_iterations=2, rows=8)
    run = functools.partial(of_each_row(mosaic(bfloat16())), params, s=s)
    with sharding.on(mesh_of(data=8)), interpreted():
        program = str(jax.make_jaxpr(run)(context, x))
    assert program.count("shard_map[") == 2  # one an iteration
    assert "f32[1,64,32]" in program and "f32[64,32]" in program


@pytest.mark.parametrize(
    "device, fields, named",
    [
        (Device("cpu"), {}, "Hopper GPU, compute capability 9.x, not cpu: "),
        (Device("gpu", (8, 0)), {}, "not gpu 8.0: "),
        (Device("gpu"), {}, "not gpu: "),  # of another maker
        (H100, {"compute_dtype": "float32"}, "compute_dtype"),
        (H100, {"controller_width": 32}, "controller_width"),
        (H100, {"integrator_segment": 2}, "integrator_segment"),
        (H100, {"trajectory_dtype": "bfloat16"}, "trajectory_dtype"),
        (H100, {"unroll": "none"}, "unroll"),
        (H100, {"integrator_gradient": "autodiff"}, "integrator_gradient"),
        (H100, {"d_model": 48}, "d_model"),
    ],
)
def test_integrator_kernel_refuses_by_name_what_the_kernels_are_not_made_for(
    model_config, device, fields, named
):
    fits = {"d_model": 64, "controller_width": 64, "integrator_kernel": "mosaic"}
    with made_for(device), pytest.raises(InputError, match=named):
        integrator_kernel(model_config(**fits | fields))


def test_integrator_kernel_refuses_a_sharded_width(model_config):
    config = model_config(d_model=64, controller_width=64, integrator_kernel="mosaic")
    with made_for(H100), sharding.on(mesh_of(tensor=2)):
        with pytest.raises(InputError, match=r"all of D on one device, not mesh\.tensor=2: "):
            integrator_kernel(config)


def test_integrator_kernel_is_mosaic_only_if_asked_for(model_config):
    with made_for(H100):
        for asked, chosen in (("auto", "xla"), ("xla", "xla"), ("mosaic", "mosaic")):
            config = model_config(d_model=64, controller_width=64, integrator_kernel=asked)
            assert integrator_kernel(config) == chosen
