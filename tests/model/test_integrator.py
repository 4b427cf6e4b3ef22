import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from integrator_cases import F32, F64, inputs, layer_params, reference

from inl_jax.model.dynamics import Dynamics
from inl_jax.model.integrator import integrate, integrate_until

D, C = 12, 8
SLOW = pytest.mark.slow
compiled = jax.jit(integrate, static_argnames=("num_iterations", "dynamics", "chunk"))
until = jax.jit(integrate_until, static_argnames=("num_iterations", "dynamics", "chunk"))


@pytest.fixture
def config(model_config):
    return model_config(d_model=D, controller_width=C, num_heads=1)


@pytest.mark.parametrize("chunk", [0, 2])
def test_integrate_follows_the_equations(config, chunk):
    """Also in chunks of positions, of which the last is padded."""
    settings = dict(amplitude=0.03, num_iterations=4)
    with jax.enable_x64(True):
        params, h, x = inputs(config, F64, batch=1, positions=3)
        found = compiled(params, h, x, dynamics=Dynamics(0.1, 1.0, F64), chunk=chunk, **settings)
        for i in range(3):
            wanted = reference(params, h[0, i], x[0, i], dt=0.1, kappa=1.0, **settings)
            np.testing.assert_allclose(found[0, i], wanted, rtol=1e-12)


@pytest.mark.parametrize(
    "dtype, kappa",
    [
        (jnp.float32, 1.0),
        (jnp.bfloat16, float("inf")),
        pytest.param(jnp.float32, float("inf"), marks=SLOW),
        pytest.param(jnp.bfloat16, 1.0, marks=SLOW),
    ],
)
def test_integrate_has_a_finite_gradient_at_equilibrium(config, dtype, kappa):
    """At x == mu the norm has no derivative; the layer must have one."""
    params = jax.tree.map(lambda p: p.astype(dtype), layer_params(config))
    x = jnp.broadcast_to(params["mu"], (1, 2, D))

    def total(params, x):
        out = integrate(
            params,
            jnp.zeros_like(x),
            x,
            amplitude=0.0,
            num_iterations=15,
            dynamics=Dynamics(dt=0.1, kappa=kappa, dtype=dtype),
        )
        return out.sum()

    for leaf in jax.tree.leaves(jax.jit(jax.grad(total, (0, 1)))(params, x)):
        assert jnp.isfinite(leaf).all()


def test_integrate_stays_bounded_under_adversarial_controllers(config):
    """200 steps with alpha, beta and gate held at any extreme; the candidate is of order 1.

    (A candidate that grows with the state is feedback of its own, which no bound on beta stops.)
    """
    x = jax.random.normal(jax.random.key(3), (1, 64, D))
    params = layer_params(config)
    params["output_kernel"] = jnp.zeros_like(params["output_kernel"])
    for key in range(20):
        extremes = jax.random.choice(
            jax.random.key(key), jnp.array([-1e4, -5.0, 0.0, 5.0, 25.0, 1e4]), (3, D)
        )
        params["output_bias"] = jnp.concatenate([extremes, jnp.ones((1, D))])
        out = compiled(
            params, x, x, amplitude=0.03, num_iterations=200, dynamics=Dynamics(0.1, 1.0, F32)
        )
        assert jnp.abs(out).max() < 1e3


def test_integrate_keeps_a_float32_state_with_bfloat16_products(config):
    """1.0 + 0.1 * 0.03 is 1.0 in bfloat16; the state must move all the same."""
    params = jax.tree.map(jnp.zeros_like, layer_params(config))
    params |= {
        "output_bias": layer_params(config)["output_bias"],
        "mu": jnp.ones(D),
        "phi": jnp.full(D, jnp.pi / 2),
    }
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    x = jnp.ones((1, 1, D), jnp.bfloat16)
    bfloat16 = Dynamics(0.1, 1.0, jnp.dtype("bfloat16"))
    out = compiled(params, x, x, amplitude=0.03, num_iterations=1, dynamics=bfloat16)
    np.testing.assert_allclose(out, 1 + 0.1 * 0.5 * 0.03, rtol=1e-5)


def test_beta_starts_where_the_config_says(config):
    started = layer_params(dataclasses.replace(config, initial_beta=0.02))
    np.testing.assert_allclose(jax.nn.softplus(started["output_bias"][1]), 0.02, rtol=1e-5)
    np.testing.assert_array_equal(
        np.delete(started["output_bias"], 1, 0),
        np.delete(layer_params(config)["output_bias"], 1, 0),
    )


def test_controllers_of_width_0_are_constants(model_config, config):
    """They have no kernels, and do what controllers do whose output kernels are 0."""
    params, h, x = inputs(config, F32)
    params["output_kernel"] = jnp.zeros_like(params["output_kernel"])
    without = model_config(d_model=D, controller_width=0, num_heads=1)
    constants = {name: params[name] for name in layer_params(without)}
    assert constants.keys() == {"mu", "gamma", "phi", "output_bias"}
    settings = dict(amplitude=0.03, num_iterations=3, dynamics=Dynamics(0.1, 1.0, F32))
    found, wanted = (compiled(p, h, x, **settings) for p in (constants, params))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    np.testing.assert_array_equal(found, compiled(constants, jnp.zeros_like(h), x, **settings))


def test_integrate_takes_another_amplitude_without_recompiling(config):
    params = layer_params(config)
    x = jnp.ones((1, 2, D))
    run = jax.jit(
        lambda amplitude: integrate(
            params, x, x, amplitude=amplitude, num_iterations=3, dynamics=Dynamics(0.1, 1.0, F32)
        )
    )
    assert not jnp.allclose(run(0.03), run(0.3))
    assert run._cache_size() == 1


@pytest.mark.parametrize("chunk", [0, 4])
def test_integrate_until_stops_each_token_where_a_plain_loop_does(config, chunk):
    """Also in chunks of positions, of which the last is padded."""
    T, tokens, settings = 6, 10, dict(amplitude=0.03, dt=1.0, kappa=1.0)
    with jax.enable_x64(True):
        params, h, x = inputs(config, F64, batch=1, positions=tokens)
        states = np.array(
            [
                [reference(params, *token, num_iterations=t, **settings) for t in range(T + 1)]
                for token in zip(h[0], x[0], strict=True)
            ]
        )
        moves = np.sqrt(np.mean(np.diff(states, axis=1) ** 2, axis=-1))  # [tokens, T]
        tol = np.quantile(moves, 0.2)
        small = moves < tol
        steps = np.where(small.any(axis=1), 1 + small.argmax(axis=1), T)
        settings = dict(amplitude=0.03, num_iterations=T, dynamics=Dynamics(1.0, 1.0, F64))
        found, taken = until(params, h, x, tol=tol, chunk=chunk, **settings)
        assert len(set(steps)) > 2, "the tokens hardly differ, so little was shown"
        assert taken[0].tolist() == steps.tolist()
        np.testing.assert_allclose(found[0], states[range(tokens), steps], rtol=1e-12)


@pytest.mark.parametrize("dtype", [F32, jnp.dtype("bfloat16")])
def test_integrate_until_takes_all_steps_or_one_at_the_ends_of_tol(config, dtype):
    params, h, x = inputs(config, dtype)
    settings = dict(amplitude=0.03, num_iterations=4, dynamics=Dynamics(0.1, 1.0, dtype))
    every, steps = until(params, h, x, tol=1e-30, **settings)
    np.testing.assert_array_equal(every, compiled(params, h, x, **settings))
    assert (steps == 4).all() and every.dtype == F32
    first, steps = until(params, h, x, tol=1e9, **settings)
    once = compiled(params, h, x, **settings | {"num_iterations": 1})
    np.testing.assert_array_equal(first, once)
    assert (steps == 1).all()


def test_integrate_until_gives_a_row_the_same_in_any_batch(config):
    params, h, x = inputs(config, F32)
    x = x.at[1].multiply(5.0)  # a neighbour that moves on when the first row has stopped
    settings = dict(amplitude=0.03, num_iterations=6, dynamics=Dynamics(0.1, 1.0, F32), tol=0.1)
    (both, steps), (alone, steps_alone) = (
        until(params, h[:rows], x[:rows], **settings) for rows in (2, 1)
    )
    assert steps[0].max() < steps[1].max()
    assert steps[0].tolist() == steps_alone[0].tolist()
    np.testing.assert_allclose(both[0], alone[0], rtol=1e-5, atol=1e-6)
