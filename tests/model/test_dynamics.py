import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of
from integrator_cases import F64, inputs, layer_params, reference

from inl_jax.model.dynamics import (
    Dynamics,
    coefficients,
    controller_hidden,
    excitation,
    hidden_from_context,
    rms_error,
    run,
)
from inl_jax.parallel import sharding


@pytest.mark.parametrize("kappa", [0.3, float("inf"), pytest.param(1.0, marks=pytest.mark.slow)])
def test_run_follows_the_equations(model_config, kappa):
    config, T = model_config(d_model=12), 4

    @jax.jit
    def final_state(params, h, x):
        s = excitation(params["gamma"], params["phi"], amplitude=0.03, num_iterations=T)
        from_context = hidden_from_context(params, h, dtype=F64)
        return run(params, from_context, x, s, dynamics=Dynamics(0.1, kappa, F64))

    with jax.enable_x64(True):
        params, h, x = inputs(config, F64, batch=1, positions=1)
        found = final_state(params, h, x)[0, 0]
        constants = dict(amplitude=0.03, num_iterations=T, dt=0.1, kappa=kappa)
        wanted = reference(params, h[0, 0], x[0, 0], **constants)
        np.testing.assert_allclose(found, wanted, rtol=1e-12)


@pytest.mark.parametrize("tensor, products", [(1, 2), (2, 1)])
def test_controller_hidden_is_one_product_if_devices_sum_it(model_config, tensor, products):
    """Traced: each product whose channels are sharded is exchanged, in every step."""
    params, _, x = jax.eval_shape(lambda: inputs(model_config(), jnp.bfloat16))
    with sharding.on(mesh_of(tensor=tensor)):
        program = str(jax.make_jaxpr(controller_hidden)(params, jnp.zeros(()), x, x))
    assert program.count("dot_general[") == products


def test_coefficients_start_at_their_documented_values(model_config):
    """alpha0 = 0.8, beta = 0.5, gate = 0.5, c = 0 before any learning."""
    bias = layer_params(model_config())["output_bias"]
    alpha, beta, gate, c = coefficients(bias, 1.0, dt=0.1, kappa=float("inf"))
    for found, wanted in ((alpha, 0.8), (beta, 0.5), (gate, 0.5), (c, 0.0)):
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_coefficients_keep_the_step_stable_for_any_outputs():
    """The step's matrix [[1 - dt g b, dt g a], [-b, a]] has no eigenvalue outside the unit disk."""
    dt = 0.1
    extreme = jnp.array([-1e4, -30.0, -1.0, 0.0, 1.0, 18.0, 20.0, 25.0, 30.0, 1e4])
    o_alpha, o_beta, o_gate, rms = (
        grid.ravel()[:, None, None, None]
        for grid in jnp.meshgrid(extreme, extreme, extreme, jnp.array([0.0, 1e-3, 1.0, 1e3]))
    )
    o = jnp.stack([o_alpha, o_beta, o_gate, jnp.zeros_like(o_gate)])
    a, b, g, _ = (np.asarray(c, np.float64).ravel() for c in coefficients(o, rms, dt=dt, kappa=1.0))
    pull = dt * g
    matrices = np.stack([np.stack([1 - pull * b, pull * a], -1), np.stack([-b, a], -1)], axis=-2)
    assert (pull * b <= 2 * (1 + a) * (1 + 1e-6)).all()
    assert np.abs(np.linalg.eigvals(matrices)).max() <= 1 + 1e-3
    assert (b > 19.9).any(), "the bound was never reached, so nothing was shown"


def test_distance_has_gradient_zero_at_equilibrium():
    """There the norm itself has no derivative."""
    mu = jnp.ones(6)
    by_x, by_mu = jax.grad(lambda x, mu: rms_error(x, mu).sum(), (0, 1))(mu[None, None], mu)
    assert not by_x.any() and not by_mu.any()
