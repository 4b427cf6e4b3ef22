import functools

import jax
import jax.numpy as jnp
import pytest
from conftest import mesh_of
from mosaic_cases import arrays, bfloat16, distance

from inl_jax.config import InputError
from inl_jax.model.device import H100, Device, made_for
from inl_jax.model.dynamics_vjp import TRAJECTORY, run_lean
from inl_jax.model.mosaic.run import integrator_kernel, run_mosaic
from inl_jax.model.mosaic.tiles import interpreted
from inl_jax.parallel import sharding

SLOW = pytest.mark.slow
INF = float("inf")


def value_and_gradients(run, arguments):
    def loss(*arguments):
        x = run(*arguments)
        return jnp.sum(x * jnp.sin(jnp.arange(x.size).reshape(x.shape))), x

    (_, x), gradients = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(*arguments)
    return x, gradients


def mosaic(dynamics):
    return lambda *arguments: run_mosaic(*arguments, dynamics)


def xla(dynamics):
    return lambda *arguments: run_lean(*arguments, dynamics, 1)


@pytest.mark.parametrize(
    "rows, tokens, width, T, kappa",
    [
        (1, 65, 32, 2, 1.0),
        pytest.param(1, 64, 64, 1, INF, marks=SLOW),
        pytest.param(2, 50, 96, 3, 0.3, marks=SLOW),
        pytest.param(3, 1, 64, 2, INF, marks=SLOW),
        pytest.param(1, 128, 128, 4, 1.0, marks=SLOW),
    ],
)
def test_run_mosaic_is_run_lean_within_bfloat16(rows, tokens, width, T, kappa):
    """Also with tokens that fill no program, and with a first step alone."""
    arguments = arrays(tokens, width, rows=rows, num_iterations=T)
    dynamics = bfloat16(kappa)
    wanted_x, wanted = value_and_gradients(xla(dynamics), arguments)
    with interpreted():
        found_x, found = jax.jit(functools.partial(value_and_gradients, mosaic(dynamics)))(
            arguments
        )
    assert distance(found_x, wanted_x) < 1e-3
    assert distance(found[1:], wanted[1:]) < 2e-2
    first_step = T == 1  # which reads no Wv
    for name, gradient in found[0].items():
        if name == "state_kernel" and first_step:
            assert not gradient[1].any()
            assert distance(gradient[0], wanted[0][name][0]) < 2e-2
        else:
            assert distance(gradient, wanted[0][name]) < 2e-2, name


@SLOW
@pytest.mark.parametrize("remat", ["all", "trajectory"])
def test_run_mosaic_works_under_remat_and_a_scan_over_layers(remat):
    """With a policy that keeps the trajectory, the backward pass runs no kernel again."""
    params, context, x, s = arrays(64, 32, num_iterations=2)
    layers = jax.tree.map(lambda p: jnp.stack([p, 0.9 * p]), params)
    policies = jax.checkpoint_policies
    policy = policies.save_only_these_names(TRAJECTORY) if remat == "trajectory" else None

    def through_layers(run, layers, x):
        def layer(x, params):
            return run(params, context, x, s), None

        return jax.lax.scan(jax.checkpoint(layer, policy=policy), x, layers)[0]

    def gradients(run):
        return jax.jit(jax.grad(lambda *a: through_layers(run, *a).sum(), (0, 1)))

    wanted = gradients(xla(bfloat16()))(layers, x)
    with interpreted():
        found = gradients(mosaic(bfloat16()))(layers, x)
    assert distance(found, wanted) < 2e-2


@SLOW
def test_run_mosaic_runs_on_a_mesh_each_device_with_its_rows():
    params, context, x, s = arrays(16, 32, num_iterations=2, rows=8)
    dynamics = bfloat16()
    wanted = jax.vmap(lambda c, x: run_lean(params, c[None], x[None], s, dynamics, 1)[0])(
        context, x
    )
    with sharding.on(mesh_of(data=8)), interpreted():
        found = jax.jit(
            jax.vmap(lambda c, x: run_mosaic(params, c[None], x[None], s, dynamics)[0])
        )(context, x)
    assert distance(found, wanted) < 1e-3


def test_run_mosaic_refuses_a_sharded_width():
    with sharding.on(mesh_of(tensor=2)), pytest.raises(InputError, match=r"mesh\.tensor=2"):
        run_mosaic(*arrays(64, 32), bfloat16())


@pytest.mark.parametrize(
    "device, fields, named",
    [
        (Device("cpu"), {}, "Hopper"),
        (Device("gpu", (8, 0)), {}, "Hopper"),
        (H100, {"compute_dtype": "float32"}, "compute_dtype"),
        (H100, {"controller_width": 32}, "controller_width"),
        (H100, {"integrator_segment": 2}, "integrator_segment"),
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


def test_integrator_kernel_is_mosaic_only_if_asked_for(model_config):
    with made_for(H100):
        for asked, chosen in (("auto", "xla"), ("xla", "xla"), ("mosaic", "mosaic")):
            config = model_config(d_model=64, controller_width=64, integrator_kernel=asked)
            assert integrator_kernel(config) == chosen
