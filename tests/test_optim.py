import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from inl_jax.model import abstract_params
from inl_jax.optim import (
    decay_mask,
    learning_rate_schedule,
    make_optimizer,
    record_norm,
    with_float32_masters,
)


def test_the_schedule_warms_up_to_the_peak_and_ends_at_its_fraction(train_config):
    config = train_config(
        optim={"learning_rate": 4e-3, "warmup_steps": 10, "final_lr_fraction": 0.25},
        num_steps=110,
    )
    schedule = learning_rate_schedule(config, 110)
    # The cosine runs over the 100 updates after the warmup: its middle is at 60.
    steps = {0: 0, 5: 2e-3, 10: 4e-3, 60: 2.5e-3, 110: 1e-3, 200: 1e-3}
    for step, value in steps.items():
        assert schedule(step) == pytest.approx(value, rel=1e-5, abs=1e-12), step


@pytest.mark.parametrize("context", ["mean", "decay", "attention"])
def test_weight_decay_applies_to_kernels_and_the_embedding_only(model_config, context):
    params = abstract_params(model_config(context=context))
    decayed = {
        path[-1].key for path, on in jax.tree_util.tree_leaves_with_path(decay_mask(params)) if on
    }
    mixer = {"attention": {"query_kernel", "key_kernel", "value_kernel"}}.get(context, {"kernel"})
    assert decayed == mixer | {
        "embedding", "context_kernel", "state_kernel", "output_kernel", "up_kernel", "down_kernel"
    }  # fmt: skip


def test_undecayed_weights_stay_without_a_gradient(train_config):
    optimizer = make_optimizer(train_config(optim={"warmup_steps": 0}), 10)
    params = {"up_kernel": jnp.ones(3), "up_bias": jnp.ones(3), "mu": jnp.ones(3)}
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
    )
    np.testing.assert_allclose(updates["up_kernel"], -1e-2 * 0.1, rtol=1e-5)
    assert not updates["up_bias"].any() and not updates["mu"].any()


def descend(optimizer, params, *, steps, dtype=jnp.float32):
    """Small steps towards 0 for kernel and bias, from gradients that do not change."""

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(lambda p: jnp.full(p.shape, 0.01, dtype), params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


@pytest.fixture
def small_steps(train_config):
    """Makes the optimizer of a run at learning rate 3e-5 from its first update on."""

    def make(param_dtype, accumulate_steps=1):
        config = train_config(
            model={"param_dtype": param_dtype},
            optim={"learning_rate": 3e-5, "warmup_steps": 0},
            accumulate_steps=accumulate_steps,
        )
        return make_optimizer(config, 10_000)

    return make


WEIGHTS = {"up_kernel": jnp.full((4,), 0.02), "up_bias": jnp.array([0.02, 0.5, -0.02, 1.0])}


def test_float32_masters_let_bfloat16_weights_follow_float32_training(small_steps):
    exact, _ = descend(small_steps("float32"), WEIGHTS, steps=50)
    start = optax.tree.cast(WEIGHTS, jnp.bfloat16)
    followed, state = descend(small_steps("bfloat16"), start, steps=50)
    trapped, _ = descend(small_steps("float32"), start, steps=50)

    masters = optax.tree.get(state, "masters")
    for name in WEIGHTS:
        assert followed[name].dtype == jnp.bfloat16 and masters[name].dtype == jnp.float32
        np.testing.assert_array_equal(followed[name], masters[name].astype(jnp.bfloat16))
        # From one rounding of the start on, the masters move as float32 weights do.
        moved, expected = masters[name] - start[name].astype(jnp.float32), exact[name]
        np.testing.assert_allclose(moved, expected - WEIGHTS[name], rtol=1e-3, atol=1e-7)
        # The trap: added to bfloat16 weights, the same updates vanish.
        np.testing.assert_array_equal(trapped[name], start[name])
    assert np.all(followed["up_kernel"] < start["up_kernel"])


def test_a_landing_is_exact_from_and_to_any_bfloat16():
    """Across magnitudes and signs, also where param and master are far apart."""
    rng = np.random.default_rng(0)
    start, target = (
        jnp.asarray(rng.normal(size=2000) * 10.0 ** rng.integers(-6, 4, 2000), jnp.float32)
        for _ in range(2)
    )
    optimizer = with_float32_masters(optax.sgd(1.0))
    params = start.astype(jnp.bfloat16)
    state = optimizer.init(params)
    updates, state = optimizer.update(state.masters - target, state, params)
    landed = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(landed, state.masters.astype(jnp.bfloat16))
    np.testing.assert_allclose(state.masters, target, rtol=1e-6, atol=1e-2)


def test_masters_work_inside_accumulation(small_steps):
    start = optax.tree.cast(WEIGHTS, jnp.bfloat16)
    plain, plain_state = descend(small_steps("bfloat16"), start, steps=50)
    accumulated, state = descend(small_steps("bfloat16", 2), start, steps=100)
    get = functools.partial(optax.tree.get, key="masters")
    for name in WEIGHTS:
        np.testing.assert_array_equal(accumulated[name], plain[name])
        np.testing.assert_allclose(get(state)[name], get(plain_state)[name], rtol=1e-6)
    between, _ = descend(small_steps("bfloat16", 2), start, steps=99)
    before, _ = descend(small_steps("bfloat16", 2), start, steps=98)
    jax.tree.map(np.testing.assert_array_equal, between, before)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("accumulate_steps", [1, 2])
def test_the_optimizer_state_is_float32(small_steps, model_config, param_dtype, accumulate_steps):
    params = abstract_params(model_config(param_dtype=param_dtype))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(param_dtype)}
    state = jax.eval_shape(small_steps(param_dtype, accumulate_steps).init, params)
    trees = 2 + (param_dtype == "bfloat16") + (accumulate_steps > 1)  # as large as the parameters
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim > 0]
    assert {leaf.dtype for leaf in arrays} == {jnp.dtype("float32")}
    assert sum(leaf.size for leaf in arrays) == trees * size


def test_the_recorded_norm_is_that_of_the_mean_gradient_before_clipping(train_config):
    config = train_config(optim={"clip_norm": 0.1}, accumulate_steps=2)
    optimizer = make_optimizer(config, 10)
    params = {"up_kernel": jnp.ones(2)}
    state = optimizer.init(params)
    for gradient in ([8.0, 0.0], [-2.0, 8.0]):
        _, state = optimizer.update({"up_kernel": jnp.array(gradient)}, state, params)
    assert optax.tree.get(state, "grad_norm") == pytest.approx(5.0)  # of [3, 4]


def test_record_norm_changes_nothing():
    gradient = {"a": jnp.array([3.0]), "b": jnp.array([[4.0]])}
    transform = record_norm()
    passed, state = transform.update(gradient, transform.init(gradient))
    assert passed == gradient and state.grad_norm == pytest.approx(5.0)
