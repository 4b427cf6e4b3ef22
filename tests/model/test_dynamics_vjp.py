import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from integrator_cases import F32, F64, assert_close, inputs, value_and_gradients

from inl_jax.config import ModelConfig
from inl_jax.model.dynamics import Dynamics
from inl_jax.model.integrator import integrate
from inl_jax.model.language_model import abstract_params

BF16 = jnp.dtype("bfloat16")
SLOW = pytest.mark.slow


@pytest.fixture
def config(model_config):
    return model_config(d_model=12, controller_width=8, num_heads=1)


def check_gradient(config, dtype, num_iterations, kappa, options):
    """By the amplitude it is one number, a sum of both signs over tokens, channels and iterations:

    in float32, where the others agree to 2e-6, autodiff's own is up to 2e-6 from that in float64.
    """
    tolerance, of_amplitude = (1e-10, 1e-10) if dtype == F64 else (2e-6, 1e-5)
    common = dict(kappa=kappa, num_iterations=num_iterations, dtype=dtype)
    with jax.enable_x64(dtype == F64):
        arrays = inputs(config, dtype)
        wanted = value_and_gradients(*arrays, gradient="autodiff", **common)
        found = value_and_gradients(*arrays, **common, **options)
    assert_close((found[0], found[1][:3]), (wanted[0], wanted[1][:3]), tolerance)
    assert_close(found[1][3], wanted[1][3], of_amplitude)


@pytest.mark.parametrize(
    "dtype, num_iterations, kappa, options",
    [
        (F64, 1, 1.0, {}),
        (F64, 2, float("inf"), {"segment": 2}),
        (F64, 6, 0.3, {"segment": 4, "chunk": 2}),
        (F64, 15, 1.0, {"segment": 7}),
        (F64, 4, 1.0, {"segment": 2, "unroll": True}),
        pytest.param(F64, 15, 0.3, {"unroll": True, "remat": True, "chunk": 2}, marks=SLOW),
        pytest.param(F32, 15, float("inf"), {"unroll": True}, marks=SLOW),
        pytest.param(F32, 15, 1.0, {"segment": 7}, marks=SLOW),  # by default the test of beta
        pytest.param(F64, 15, 1.0, {"segment": 20, "remat": True}, marks=SLOW),
    ],
)
def test_run_lean_has_the_gradient_of_run(config, dtype, num_iterations, kappa, options):
    check_gradient(config, dtype, num_iterations, kappa, options)


@SLOW
@pytest.mark.parametrize("kappa", [1.0, float("inf")])
@pytest.mark.parametrize("num_iterations", range(1, 16))
@pytest.mark.parametrize(
    "options", [{}, {"segment": 2}, {"segment": 4, "chunk": 2}, {"segment": 20, "remat": True}]
)
def test_run_lean_has_the_gradient_for_every_number_of_iterations(
    config, num_iterations, kappa, options
):
    for dtype in (F64, F32):
        check_gradient(config, dtype, num_iterations, kappa, options)


@pytest.mark.parametrize("options", [{}, {"segment": 2, "chunk": 3}])
@pytest.mark.parametrize("batch, positions, width", [(1, 1, 2), (1, 7, 10), (3, 1, 6)])
@SLOW
def test_run_lean_has_the_gradient_for_other_shapes(model_config, batch, positions, width, options):
    config = model_config(d_model=width, controller_width=5, num_heads=1)
    with jax.enable_x64(True):
        arrays = inputs(config, F64, batch=batch, positions=positions)
        common = dict(num_iterations=4, dtype=F64)
        wanted = value_and_gradients(*arrays, gradient="autodiff", **common)
        assert_close(value_and_gradients(*arrays, **common, **options), wanted, 1e-10)


def test_run_lean_has_the_gradient_of_controllers_that_read_nothing(model_config):
    check_gradient(
        model_config(d_model=12, controller_width=0, num_heads=1), F64, 3, 1.0, {"segment": 2}
    )


def test_run_lean_has_the_gradient_beyond_the_bound_of_beta(config):
    """There beta does not depend on its controller."""
    params, h, x = inputs(config, F32)
    params["output_bias"] = params["output_bias"].at[1].set(1e3)
    common = dict(num_iterations=3, dtype=F32)
    found = value_and_gradients(params, h, x, **common)
    wanted = value_and_gradients(params, h, x, gradient="autodiff", **common)
    assert_close(found, wanted, 2e-6)
    by_output_bias = found[1][0]["output_bias"]
    assert not by_output_bias[1].any() and by_output_bias[0].all()


def test_run_lean_in_bfloat16_is_near_float32(config):
    """Products in bfloat16, sums in float32. The amplitude's one number cancels, and may be off."""
    arrays = inputs(config, F32, positions=64)
    _, wanted = value_and_gradients(*arrays, num_iterations=6, dtype=F32)
    _, found = value_and_gradients(*arrays, num_iterations=6, dtype=BF16)
    assert_close(found[:3], wanted[:3], 0.1)


def test_run_lean_with_a_bfloat16_trajectory_rounds_the_gradient_and_not_the_state(config):
    arrays = inputs(config, F32, positions=64)
    common = dict(num_iterations=6, dtype=F32)
    value, wanted = value_and_gradients(*arrays, **common)
    same, found = value_and_gradients(*arrays, trajectory_dtype=BF16, **common)
    assert same == value
    assert_close(found, wanted, 5e-3)
    with pytest.raises(AssertionError):
        assert_close(found, wanted, 1e-4)


def kept_shapes(config, tokens, **options):
    """Shapes of what the gradient keeps for the backward pass, if they grow with the tokens.

    They are exact, and nothing is allocated.
    """
    params = {
        name: jax.ShapeDtypeStruct(p.shape[1:], F32)
        for name, p in abstract_params(config)["blocks"]["integrator"].items()
    }
    array = jax.ShapeDtypeStruct((1, tokens, config.d_model), F32)

    def pullback(*arrays):
        function = lambda *arrays: integrate(  # noqa: E731
            *arrays,
            amplitude=0.03,
            num_iterations=config.num_iterations,
            dynamics=Dynamics(0.1, 1.0, F32),
            **options,
        )
        return jax.vjp(function, *arrays)[1]

    kept = jax.tree.leaves(jax.eval_shape(pullback, params, array, array))
    return [leaf.shape for leaf in kept if tokens in leaf.shape]


def test_run_lean_keeps_about_two_vectors_per_token_and_iteration():
    """Vectors of width D, at the 3b integrator's shapes."""
    D, T, S = 2048, 15, 4099  # a prime, which no other axis has
    config = ModelConfig(d_model=D, num_iterations=T, num_layers=1)

    def widths(**options):
        return sum(np.prod(shape) for shape in kept_shapes(config, S, **options)) / (D * T * S)

    assert widths() <= 2.2
    assert widths(segment=4) <= 0.7
    assert widths(segment=7) <= 0.55
    assert widths(remat=True) <= 2 / T + 0.01  # the context and the first state
    assert widths(gradient="autodiff") > 10
    # A stack over iterations holds a vector, the hidden activations or a scalar: never 4 D.
    for shape in kept_shapes(config, S):
        per_token = np.prod(shape) / S / (T - 1 if shape[0] == T - 1 else 1)
        assert per_token <= D, shape


def test_run_lean_stacks_no_array_of_all_outputs():
    """No scan of the gradient stacks [tokens, 4 D]."""
    T, S, D = 5, 64, 32
    params, h, x = inputs(ModelConfig(d_model=D, controller_width=4), F32, batch=1, positions=S)

    def program(gradient):
        total = lambda *arrays: integrate(  # noqa: E731
            *arrays,
            amplitude=0.03,
            num_iterations=T,
            dynamics=Dynamics(0.1, 1.0, F32),
            gradient=gradient,
        ).sum()
        return jax.make_jaxpr(jax.grad(total, (0, 1, 2)))(params, h, x).jaxpr

    def per_iteration(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "scan":
                (body,) = jax.extend.core.jaxprs_in_params(eqn.params)
                pairs = zip(eqn.outvars, body.outvars, strict=True)
                yield sum(o.aval.size // T for o, i in pairs if o.aval.ndim > i.aval.ndim)
            for sub in jax.extend.core.jaxprs_in_params(eqn.params):
                yield from per_iteration(sub)

    lean, autodiff = (list(per_iteration(program(g))) for g in ("lean", "autodiff"))
    assert max(lean) < 3 * S * D < 4 * S * D < max(autodiff)


def test_unrolled_run_lean_has_no_loop(config):
    params, h, x = inputs(config, F32)

    def program(unroll):
        total = lambda *arrays: integrate(  # noqa: E731
            *arrays,
            amplitude=0.03,
            num_iterations=7,
            dynamics=Dynamics(0.1, 1.0, F32),
            segment=3,
            unroll=unroll,
        ).sum()
        return jax.jit(jax.grad(total)).lower(params, h, x).as_text()

    assert "while" in program(False)
    assert "while" not in program(True)
