import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inl_jax.integrator import CONTROLLERS, Integrator, coefficients, integrate

D, C = 12, 8


def layer_params(config, key=0, scale=0.0):
    """Parameters of one layer; `scale` adds noise to every leaf, so that none is at a zero."""
    ones = jnp.ones((1, 1, config.d_model))
    layer = Integrator(config)
    params = layer.init(jax.random.key(key), ones, ones, amplitude=0.0, dtype=jnp.float32)
    params = jax.tree.map(
        lambda box: box.value, params["params"], is_leaf=lambda x: hasattr(x, "value")
    )
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(key + 1), len(leaves))
    noisy = [
        x + scale * jax.random.normal(k, x.shape, x.dtype)
        for x, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, noisy)


@pytest.fixture
def config(model_config):
    return model_config(d_model=D, controller_width=C, num_heads=1)


def reference(params, h, x, *, amplitude, num_iterations, dt, kappa):
    """The equations of one token, written out with loops, in numpy float64."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    x, v = np.array(x, np.float64), np.zeros(D)
    for t in range(num_iterations):
        o = {}
        for q, name in enumerate(CONTROLLERS):
            inputs = np.concatenate([h, x, v])
            kernel = np.concatenate([p["context_kernel"][:, q], p["state_kernel"][:, q]])
            r = np.maximum(inputs @ kernel + p["hidden_bias"][q], 0)
            o[name] = r @ p["output_kernel"][q] + p["output_bias"][q]
        e = x - p["mu"]
        alpha = 1 / (1 + np.exp(-o["alpha"])) * (1 - np.exp(-kappa * np.sqrt(np.mean(e**2))))
        beta = np.minimum(np.log1p(np.exp(o["beta"])), 2 / dt)
        gate = 1 / (1 + np.exp(-o["gate"]))
        s = amplitude * np.sin(p["gamma"] * t + p["phi"])
        v = alpha * v + (1 - alpha) * o["candidate"] - beta * e + s
        x = x + dt * gate * v
    return x


@pytest.mark.parametrize("kappa", [1.0, 0.3, float("inf")])
def test_follows_the_equations(config, kappa):
    settings = dict(amplitude=0.03, num_iterations=4, dt=0.1, kappa=kappa)
    with jax.enable_x64(True):
        params = layer_params(config, scale=0.5)
        params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
        h, x = jax.random.normal(jax.random.key(5), (2, 1, 1, D), jnp.float64)
        found = integrate(params, h, x, dtype=jnp.float64, **settings)[0, 0]
        np.testing.assert_allclose(
            found, reference(params, h[0, 0], x[0, 0], **settings), rtol=1e-12
        )


def test_starting_coefficients(config):
    """alpha0 = 0.8, beta = 0.5, gate = 0.5, candidate = 0 before any learning."""
    bias = layer_params(config)["output_bias"]
    o = jnp.broadcast_to(bias[:, None, None], (4, 1, 1, D))
    alpha, beta, gate, candidate = coefficients(o, jnp.ones(D), 0.0, dt=0.1, kappa=float("inf"))
    for found, wanted in ((alpha, 0.8), (beta, 0.5), (gate, 0.5), (candidate, 0.0)):
        np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kappa", [1.0, float("inf")])
def test_gradient_is_finite_at_equilibrium(config, dtype, kappa):
    """Where x == mu the norm has no derivative; the layer must have one."""
    params = jax.tree.map(lambda p: p.astype(dtype), layer_params(config))
    x = jnp.broadcast_to(params["mu"], (1, 2, D))

    def total(params, x):
        out = integrate(
            params, jnp.zeros_like(x), x, amplitude=0.0, num_iterations=15, dt=0.1, kappa=kappa,
            dtype=dtype,
        )  # fmt: skip
        return out.sum()

    for leaf in jax.tree.leaves(jax.grad(total, (0, 1))(params, x)):
        assert jnp.isfinite(leaf).all()


def test_no_controller_weights_break_the_stability_bound():
    """The step's matrix [[1 - dt g b, dt g a], [-b, a]] has no eigenvalue outside the unit disk."""
    dt = 0.1
    extreme = jnp.array([-1e4, -30.0, -1.0, 0.0, 1.0, 18.0, 20.0, 25.0, 30.0, 1e4])
    o_alpha, o_beta, o_gate, distance = (
        grid.ravel()[:, None, None, None]
        for grid in jnp.meshgrid(extreme, extreme, extreme, jnp.array([0.0, 1e-3, 1.0, 1e3]))
    )
    o = jnp.stack([o_alpha, o_beta, o_gate, jnp.zeros_like(o_gate)])
    a, b, g, _ = (np.asarray(c, np.float64).ravel() for c in
                  coefficients(o, distance, 0.0, dt=dt, kappa=1.0))  # fmt: skip
    pull = dt * g
    matrices = np.stack([np.stack([1 - pull * b, pull * a], -1), np.stack([-b, a], -1)], axis=-2)
    assert (pull * b <= 2 * (1 + a) * (1 + 1e-6)).all()
    assert np.abs(np.linalg.eigvals(matrices)).max() <= 1 + 1e-3
    assert (b > 19.9).any(), "the bound was never reached, so nothing was shown"


def test_state_stays_bounded_under_adversarial_controllers(config):
    """200 steps with alpha, beta and gate held at any extreme; the candidate drive is of order 1.

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
        out = integrate(
            params, x, x, amplitude=0.03, num_iterations=200, dt=0.1, kappa=1.0, dtype=jnp.float32
        )
        assert jnp.abs(out).max() < 1e3


def test_bfloat16_products_keep_a_float32_state(config):
    """1.0 + 0.1 * 0.03 is 1.0 in bfloat16; the state must move all the same."""
    params = jax.tree.map(jnp.zeros_like, layer_params(config))
    params |= {"output_bias": layer_params(config)["output_bias"], "mu": jnp.ones(D),
               "phi": jnp.full(D, jnp.pi / 2)}  # fmt: skip
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    x = jnp.ones((1, 1, D), jnp.bfloat16)
    out = integrate(
        params, x, x, amplitude=0.03, num_iterations=1, dt=0.1, kappa=1.0, dtype=jnp.bfloat16
    )
    np.testing.assert_allclose(out, 1 + 0.1 * 0.5 * 0.03, rtol=1e-5)


def test_amplitude_can_change_without_recompiling(config):
    params = layer_params(config)
    x = jnp.ones((1, 2, D))
    run = jax.jit(
        lambda amplitude: integrate(
            params,
            x,
            x,
            amplitude=amplitude,
            num_iterations=3,
            dt=0.1,
            kappa=1.0,
            dtype=jnp.float32,
        )  # fmt: skip
    )
    assert not jnp.allclose(run(0.03), run(0.3))
    assert run._cache_size() == 1
