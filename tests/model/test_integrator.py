import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from inl_jax.config import ModelConfig
from inl_jax.model.dynamics import CONTROLLERS, Dynamics, coefficients
from inl_jax.model.integrator import Integrator, integrate

D, C = 12, 8
compiled = jax.jit(integrate, static_argnames=("num_iterations", "dynamics"))
F32 = jnp.dtype("float32")


@functools.partial(jax.jit, static_argnums=(0, 1))
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
            kernel = np.concatenate([p["context_kernel"][:, q], *p["state_kernel"][:, :, q]])
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
    settings = dict(amplitude=0.03, num_iterations=4)
    dynamics = Dynamics(dt=0.1, kappa=kappa, dtype=jnp.float64)
    with jax.enable_x64(True):
        params = layer_params(config, scale=0.5)
        params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
        h, x = jax.random.normal(jax.random.key(5), (2, 1, 1, D), jnp.float64)
        found = compiled(params, h, x, dynamics=dynamics, **settings)[0, 0]
        wanted = reference(params, h[0, 0], x[0, 0], dt=0.1, kappa=kappa, **settings)
        np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_starting_coefficients(config):
    """alpha0 = 0.8, beta = 0.5, gate = 0.5, candidate = 0 before any learning."""
    bias = layer_params(config)["output_bias"]
    alpha, beta, gate, candidate = coefficients(bias, 1.0, dt=0.1, kappa=float("inf"))
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


def test_no_controller_weights_break_the_stability_bound():
    """The step's matrix [[1 - dt g b, dt g a], [-b, a]] has no eigenvalue outside the unit disk."""
    dt = 0.1
    extreme = jnp.array([-1e4, -30.0, -1.0, 0.0, 1.0, 18.0, 20.0, 25.0, 30.0, 1e4])
    o_alpha, o_beta, o_gate, distance = (
        grid.ravel()[:, None, None, None]
        for grid in jnp.meshgrid(extreme, extreme, extreme, jnp.array([0.0, 1e-3, 1.0, 1e3]))
    )
    o = jnp.stack([o_alpha, o_beta, o_gate, jnp.zeros_like(o_gate)])
    a, b, g, _ = (
        np.asarray(c, np.float64).ravel()
        for c in coefficients(o, jnp.abs(distance), dt=dt, kappa=1.0)
    )
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
        out = compiled(
            params, x, x, amplitude=0.03, num_iterations=200, dynamics=Dynamics(0.1, 1.0, F32)
        )
        assert jnp.abs(out).max() < 1e3


def test_bfloat16_products_keep_a_float32_state(config):
    """1.0 + 0.1 * 0.03 is 1.0 in bfloat16; the state must move all the same."""
    params = jax.tree.map(jnp.zeros_like, layer_params(config))
    params |= {
        "output_bias": layer_params(config)["output_bias"],
        "mu": jnp.ones(D),
        "phi": jnp.full(D, jnp.pi / 2),
    }
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    x = jnp.ones((1, 1, D), jnp.bfloat16)
    out = compiled(
        params,
        x,
        x,
        amplitude=0.03,
        num_iterations=1,
        dynamics=Dynamics(0.1, 1.0, jnp.dtype("bfloat16")),
    )
    np.testing.assert_allclose(out, 1 + 0.1 * 0.5 * 0.03, rtol=1e-5)


def test_amplitude_can_change_without_recompiling(config):
    params = layer_params(config)
    x = jnp.ones((1, 2, D))
    run = jax.jit(
        lambda amplitude: integrate(
            params, x, x, amplitude=amplitude, num_iterations=3, dynamics=Dynamics(0.1, 1.0, F32)
        )
    )
    assert not jnp.allclose(run(0.03), run(0.3))
    assert run._cache_size() == 1


def inputs(config, dtype, *, batch=2, positions=5):
    h, x = jax.random.normal(jax.random.key(5), (2, batch, positions, config.d_model), F32)
    return jax.tree.map(lambda a: a.astype(dtype), (layer_params(config, scale=0.3), h, x))


def gradients(params, h, x, *, amplitude=0.03, kappa=1.0, dtype, **options):
    """By every parameter, the context, the state and the amplitude."""
    weights = jax.random.normal(jax.random.key(9), x.shape, F32)

    def total(params, h, x, amplitude):
        out = integrate(
            params, h, x, amplitude=amplitude, dynamics=Dynamics(0.1, kappa, dtype), **options
        )
        return (out * weights).sum()

    return jax.jit(jax.grad(total, (0, 1, 2, 3)))(params, h, x, jnp.asarray(amplitude, x.dtype))


def assert_close(found, wanted, tolerance):
    """Relative in the norm of each leaf; a leaf that should be zero is compared with 1."""
    named = jax.tree_util.tree_leaves_with_path(wanted)
    for (path, b), a in zip(named, jax.tree.leaves(found), strict=True):
        a, b = (np.asarray(leaf, np.float64) for leaf in (a, b))
        error = np.linalg.norm(a - b) / (np.linalg.norm(b) or 1.0)
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error}"


def check_gradient(config, num_iterations, kappa, options):
    common = dict(kappa=kappa, num_iterations=num_iterations)
    with jax.enable_x64(True):
        wide = inputs(config, jnp.float64)
        wanted = gradients(*wide, gradient="autodiff", dtype=jnp.dtype("float64"), **common)
        found = gradients(*wide, dtype=jnp.dtype("float64"), **common, **options)
    assert_close(found, wanted, 1e-10)
    narrow = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), wide)
    wanted = gradients(*narrow, gradient="autodiff", dtype=F32, **common)
    assert_close(gradients(*narrow, dtype=F32, **common, **options), wanted, 2e-6)


@pytest.mark.parametrize(
    "num_iterations, kappa, options",
    [
        (1, 1.0, {}),
        (2, float("inf"), {"segment": 2}),
        pytest.param(3, 0.3, {}, marks=pytest.mark.slow),
        (6, 1.0, {"segment": 4, "chunk": 2}),
        pytest.param(15, 1.0, {}, marks=pytest.mark.slow),
        (15, float("inf"), {"segment": 7}),
        (15, 1.0, {"segment": 20, "remat": True}),
    ],
)
def test_lean_gradient_is_the_gradient(config, num_iterations, kappa, options):
    check_gradient(config, num_iterations, kappa, options)


@pytest.mark.slow
@pytest.mark.parametrize("kappa", [1.0, float("inf")])
@pytest.mark.parametrize("num_iterations", range(1, 16))
@pytest.mark.parametrize(
    "options", [{}, {"segment": 2}, {"segment": 4, "chunk": 2}, {"segment": 20, "remat": True}]
)
def test_lean_gradient_for_every_number_of_iterations(config, num_iterations, kappa, options):
    check_gradient(config, num_iterations, kappa, options)


@pytest.mark.parametrize(
    "batch, positions, width",
    [(1, 1, 2), (1, 7, 10), pytest.param(3, 1, 6, marks=pytest.mark.slow)],
)
def test_lean_gradient_holds_for_other_shapes(model_config, batch, positions, width):
    config = model_config(d_model=width, controller_width=5, num_heads=1)
    with jax.enable_x64(True):
        arrays = inputs(config, jnp.float64, batch=batch, positions=positions)
        common = dict(num_iterations=4, dtype=jnp.dtype("float64"))
        wanted = gradients(*arrays, gradient="autodiff", **common)
        for options in ({}, {"segment": 2, "chunk": 3}):
            assert_close(gradients(*arrays, **common, **options), wanted, 1e-10)


def test_lean_gradient_where_beta_is_bounded(config):
    """Beyond the bound beta does not depend on its controller."""
    params, h, x = inputs(config, F32)
    params["output_bias"] = params["output_bias"].at[1].set(1e3)
    common = dict(num_iterations=3, dtype=F32)
    found = gradients(params, h, x, **common)
    assert_close(found, gradients(params, h, x, gradient="autodiff", **common), 2e-6)
    assert not found[0]["output_bias"][1].any() and found[0]["output_bias"][0].all()


def test_bfloat16_gradient_is_near_the_float32_one(config):
    """Products in bfloat16, sums in float32."""
    params, h, x = inputs(config, F32, positions=64)
    wanted = gradients(params, h, x, num_iterations=6, dtype=F32)
    found = gradients(params, h, x, num_iterations=6, dtype=jnp.dtype("bfloat16"))
    assert_close(found, wanted, 0.1)


def kept_widths(d_model, num_iterations, tokens, **options):
    """Shapes of what the gradient keeps that grows with the tokens: exact, nothing is allocated."""
    config = ModelConfig(d_model=d_model, num_iterations=num_iterations)
    ones = jnp.ones((1, 1, d_model))
    abstract = jax.eval_shape(
        lambda: Integrator(config).init(jax.random.key(0), ones, ones, amplitude=0.0, dtype=F32)
    )
    params = jax.tree.map(
        lambda box: box.value, abstract["params"], is_leaf=lambda x: hasattr(x, "value")
    )
    array = jax.ShapeDtypeStruct((1, tokens, d_model), F32)
    _, pullback = jax.eval_shape(
        lambda params, h, x: jax.vjp(
            lambda *args: integrate(
                *args,
                amplitude=0.03,
                num_iterations=num_iterations,
                dynamics=Dynamics(0.1, 1.0, F32),
                **options,
            ),
            params,
            h,
            x,
        ),
        params,
        array,
        array,
    )
    return [leaf.shape for leaf in jax.tree.leaves(pullback) if tokens in leaf.shape]


def test_what_the_gradient_keeps():
    """Vectors of width D per token and iteration, at the 3b integrator's shapes."""
    D, T, S = 2048, 15, 4099  # a prime, which no other axis has

    def widths(**options):
        shapes = kept_widths(D, T, S, **options)
        return sum(np.prod(shape) for shape in shapes) / (D * T * S), shapes

    lean, shapes = widths()
    assert lean <= 2.2
    assert widths(segment=4)[0] <= 0.7
    assert widths(segment=7)[0] <= 0.55
    assert widths(remat=True)[0] <= 2 / T + 0.01  # the context and the first state
    assert widths(gradient="autodiff")[0] > 10
    # A stack over iterations holds a vector, the hidden activations or a scalar: never 4 D.
    for shape in shapes:
        per_token = np.prod(shape) / S / (T - 1 if shape[0] == T - 1 else 1)
        assert per_token <= D, shape


def test_no_array_of_all_outputs_leaves_an_iteration():
    """No scan of the gradient stacks, or carries, [tokens, 4 D]."""
    T, S, D = 5, 64, 32
    params, h, x = inputs(ModelConfig(d_model=D, controller_width=4), F32, batch=1, positions=S)

    def grads(gradient):
        total = lambda *arrays: integrate(  # noqa: E731
            *arrays,
            amplitude=0.03,
            num_iterations=T,
            dynamics=Dynamics(0.1, 1.0, F32),
            gradient=gradient,
        ).sum()
        return jax.make_jaxpr(jax.grad(total, (0, 1, 2)))(params, h, x)

    def per_iteration(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "scan":
                (body,) = jax.extend.core.jaxprs_in_params(eqn.params)
                pairs = zip(eqn.outvars, body.outvars, strict=True)
                yield sum(o.aval.size // T for o, i in pairs if o.aval.ndim > i.aval.ndim)
            for sub in jax.extend.core.jaxprs_in_params(eqn.params):
                yield from per_iteration(sub)

    lean, autodiff = (list(per_iteration(grads(g).jaxpr)) for g in ("lean", "autodiff"))
    assert max(lean) < 3 * S * D < 4 * S * D < max(autodiff)
