import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from mixer_cases import FIELDS, PATTERN

from inl_jax.config import OptimConfig
from inl_jax.model.language_model import abstract_params
from inl_jax.training.optim import (
    apply_gradients,
    decay_mask,
    init_optimizer,
    learning_rates,
    make_optimizer,
    stochastic_round,
    with_bfloat16_state,
    with_float32_masters,
)


def test_learning_rates_warm_up_from_the_first_update_and_end_at_their_fraction():
    config = OptimConfig(learning_rate=4e-3, warmup_steps=10, final_lr_fraction=0.25)
    rates = learning_rates(config, 110)
    assert rates.shape == (110,) and rates.dtype == np.float32
    # The cosine runs over the 100 updates after the warmup: its middle is at 60.
    by_update = {1: 4e-4, 5: 2e-3, 10: 4e-3, 60: 2.5e-3, 110: 1e-3}
    for update, rate in by_update.items():
        assert rates[update - 1] == pytest.approx(rate, rel=1e-5), update


def test_learning_rates_are_those_of_optax():
    config = OptimConfig(learning_rate=2e-3, warmup_steps=7, final_lr_fraction=0.1)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, 7, 50, 2e-4)
    expected = [schedule(update) for update in range(1, 51)]
    np.testing.assert_allclose(learning_rates(config, 50), expected, rtol=1e-6)


@pytest.mark.parametrize("mixer", FIELDS)
def test_decay_mask_selects_kernels_and_the_embedding_only(model_config, mixer):
    params = abstract_params(model_config(**FIELDS[mixer]))
    decayed = {
        path[-1].key for path, on in jax.tree_util.tree_leaves_with_path(decay_mask(params)) if on
    }
    attention = {"query_kernel", "key_kernel", "value_kernel"}
    gated = {"kernel", "decay_kernel", "gate_kernel", "out_kernel"}
    of_mixer = {"attention": attention, "gated": gated, PATTERN: gated | attention}
    assert decayed == of_mixer.get(mixer, {"kernel"}) | {
        "embedding",
        "context_kernel",
        "state_kernel",
        "output_kernel",
        "up_kernel",
        "down_kernel",
    }


def test_make_optimizer_leaves_undecayed_weights_alone_if_their_gradient_is_zero(train_config):
    optimizer = make_optimizer(train_config())
    params = {"up_kernel": jnp.ones(3), "up_bias": jnp.ones(3), "mu": jnp.ones(3)}
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params, learning_rate=1e-2
    )
    np.testing.assert_allclose(updates["up_kernel"], -1e-2 * 0.1, rtol=1e-5)
    assert not updates["up_bias"].any() and not updates["mu"].any()


RATE = 3e-5  # at which updates are far below a unit in the last place of bfloat16


def descend(optimizer, params, *, steps, dtype=jnp.float32):
    """Small steps towards 0 for kernel and bias, from gradients that do not change."""

    @jax.jit
    def step(params, state, key):
        grads = jax.tree.map(lambda p: jnp.full(p.shape, 0.01, dtype), params)
        updates, state = optimizer.update(grads, state, params, learning_rate=RATE, key=key)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for i in range(steps):
        params, state = step(params, state, jax.random.key(i))
    return params, state


@pytest.fixture
def small_steps(train_config):
    """Makes the optimizer of a run."""

    def make(param_dtype, **optim):
        return make_optimizer(train_config(model={"param_dtype": param_dtype}, optim=optim))

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


def test_float32_masters_move_any_bfloat16_exactly_onto_their_rounding():
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


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_optimizer_state_is_float32(small_steps, model_config, param_dtype):
    params = abstract_params(model_config(param_dtype=param_dtype))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(param_dtype)}
    state = jax.eval_shape(small_steps(param_dtype).init, params)
    trees = 2 + (param_dtype == "bfloat16")  # as large as the parameters
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim > 0]
    assert {leaf.dtype for leaf in arrays} == {jnp.dtype("float32")}
    assert sum(leaf.size for leaf in arrays) == trees * size


def test_stochastic_round_takes_a_neighbour_and_has_the_right_mean():
    x = jnp.array([1.0, 1.001, -3.3, 1e-20, 0.02 + 3e-5, -0.0, jnp.inf, jnp.nan], jnp.float32)
    draws = jax.vmap(lambda key: stochastic_round(key, x))(
        jax.random.split(jax.random.key(0), 4096)
    )
    assert draws.dtype == jnp.bfloat16
    exact = np.float64(x)[:6]
    np.testing.assert_array_equal(draws[:, 6:].astype(jnp.float32), jnp.tile(x[6:], (4096, 1)))
    drawn = np.float64(draws[:, :6].astype(jnp.float32))
    ulp = np.maximum(np.abs(exact), 1e-30) * 2.0**-7
    assert (np.abs(drawn - exact) < ulp).all()  # a neighbour
    assert (drawn[:, 0] == 1.0).all()  # what fits stays
    # 4 standard errors of the mean of draws that are at most one ulp apart
    assert (np.abs(drawn.mean(0) - exact) < 4 * ulp / 2 / 64).all()
    assert len({float(v) for v in drawn[:, 1]}) == 2


def test_stochastic_rounding_lets_bfloat16_weights_follow_float32_training(small_steps):
    many = {"up_kernel": jnp.full((4096,), 0.02), "up_bias": jnp.full((4096,), 0.5)}
    exact, _ = descend(small_steps("float32"), many, steps=50)
    start = optax.tree.cast(many, jnp.bfloat16)
    optimizer = small_steps("bfloat16", rounding="stochastic", moment_dtype="bfloat16")
    followed, state = descend(optimizer, start, steps=50)
    for name in many:
        assert followed[name].dtype == jnp.bfloat16
        moved = np.float64(followed[name].astype(jnp.float32)) - np.float64(start[name])
        expected = np.float64(exact[name][0] - many[name][0])
        error = moved.std() / 64  # of the mean of 4096 weights
        assert abs(moved.mean() - expected) < 5 * error + 0.02 * abs(expected)
    sizes = {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim > 0}
    assert sizes == {jnp.dtype(jnp.bfloat16)}


def test_bfloat16_state_decays_although_rounding_to_nearest_would_freeze_it():
    inner = optax.scale_by_adam(b2=0.999)
    params = jnp.zeros(4096)
    optimizer = with_bfloat16_state(inner)
    state = optimizer.init(params)._replace(nu=jnp.ones(4096, jnp.bfloat16))
    update = jax.jit(lambda s, key: optimizer.update(jnp.zeros(4096), s, params, key=key)[1])
    for i in range(100):
        state = update(state, jax.random.key(i))
    nu = state.nu.astype(jnp.float32)
    assert jnp.bfloat16(jnp.float32(jnp.bfloat16(1.0)) * 0.999) == 1.0  # the trap
    assert nu.mean() == pytest.approx(0.999**100, rel=5e-3) and (nu >= 0).all()


STACK = {
    "blocks": {"up_kernel": jnp.linspace(-1, 1, 96).reshape(4, 4, 6), "mu": jnp.ones((4, 6))},
    "embedding": jnp.linspace(1, 2, 20).reshape(5, 4),
}


STORED = {"moment_dtype": "bfloat16"}
OPTIMIZERS = [
    ("float32", {}),
    ("bfloat16", {"optimizer": "adafactor"}),
    ("bfloat16", STORED | {"rounding": "stochastic"}),
    pytest.param("float32", {"optimizer": "adafactor"}, marks=pytest.mark.slow),
    pytest.param("float32", STORED, marks=pytest.mark.slow),
    pytest.param("bfloat16", {}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("param_dtype", "optim"), OPTIMIZERS)
def test_apply_gradients_updates_each_layer_as_if_it_were_alone(small_steps, optim, param_dtype):
    optimizer = small_steps(param_dtype, **optim)
    params = optax.tree.cast(STACK, param_dtype)
    grads = jax.tree.map(lambda p: jnp.sin(7 * p.astype(jnp.float32)), params)
    state, key = init_optimizer(optimizer, params), jax.random.key(3)
    settings = {"learning_rate": 1e-2, "scale": 0.5, "key": key}
    apply = jax.jit(lambda g, s, p: apply_gradients(optimizer, g, s, p, **settings))
    new, new_state = apply(grads, state, params)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)

    def alone(params, grads, key):
        half = jax.tree.map(lambda g: 0.5 * g, grads)
        updates, _ = optimizer.update(
            half, optimizer.init(params), params, learning_rate=1e-2, key=key
        )
        return optax.apply_updates(params, updates)

    for i in range(4):
        layer = [jax.tree.map(lambda a, i=i: a[i], tree["blocks"]) for tree in (params, grads)]
        expected = alone(*layer, jax.random.fold_in(key, i))
        found = jax.tree.map(lambda a, i=i: a[i], new["blocks"])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(
                np.float32(a), np.float32(b), rtol=1e-6, atol=1e-7
            ),
            found,
            expected,
        )
    assert not jnp.array_equal(new["embedding"], params["embedding"])


def test_apply_gradients_skips_an_update_bit_for_bit(small_steps):
    optimizer = small_steps("bfloat16")
    params = optax.tree.cast(STACK, jnp.bfloat16)
    state = init_optimizer(optimizer, params)
    nan = jax.tree.map(lambda p: jnp.full(p.shape, jnp.nan), params)
    kept = apply_gradients(optimizer, nan, state, params, learning_rate=RATE, skip=jnp.array(True))
    jax.tree.map(np.testing.assert_array_equal, kept, (params, state))


def test_apply_gradients_returns_host_state_to_the_host_with_the_same_values(small_steps):
    optimizer = small_steps("bfloat16")
    params = optax.tree.cast(STACK, jnp.bfloat16)
    grads = jax.tree.map(lambda p: jnp.cos(9 * p.astype(jnp.float32)), params)
    state = init_optimizer(optimizer, params)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    host = device.with_memory_kind("pinned_host")
    places = jax.tree.map(lambda a: host if a.ndim > 1 else device, state)
    here = jax.tree.map(lambda a: device, params)

    def run(state, places):
        step = jax.jit(
            lambda s, g, p: apply_gradients(optimizer, g, s, p, learning_rate=RATE),
            donate_argnums=(0, 2),
            out_shardings=(here, places),
        )
        copy, weights = jax.tree.map(jnp.copy, (state, params))
        mine = jax.device_put(copy, places)
        compiled = step.trace(mine, grads, weights).lower().compile()
        return compiled(mine, grads, weights), compiled.as_text()

    expected, plain = run(state, jax.tree.map(lambda a: device, state))
    found, text = run(state, places)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert {a.sharding.memory_kind for a in jax.tree.leaves(found[1])} == {"device", "pinned_host"}
    assert "S(5)" in text and "S(5)" not in plain  # XLA's name of host memory


def test_stochastic_rounding_is_refused_for_float32_parameters(train_config):
    assert OptimConfig().rounding == "masters"
    with pytest.raises(ValueError, match="optim.rounding=stochastic.*model.param_dtype=bfloat16"):
        train_config(optim={"rounding": "stochastic"})


def test_make_optimizer_does_not_know_the_length_of_the_run(train_config):
    """Only the learning rate depends on it, and that is an argument of `update`."""
    params = {"up_kernel": jnp.ones(3)}
    states = [make_optimizer(train_config(num_steps=n)).init(params) for n in (8, 80)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    update = make_optimizer(train_config()).update
    for rate in (1e-2, 1e-3):
        moved, _ = update(params, states[0], params, learning_rate=rate)
        np.testing.assert_allclose(moved["up_kernel"], -rate * 1.1, rtol=1e-5)


def test_learning_rates_of_wsd_stay_at_the_peak_and_then_fall_in_a_line():
    config = OptimConfig(
        schedule="wsd", learning_rate=2.0, warmup_steps=10, decay_fraction=0.25, final_lr_fraction=0
    )
    rates = learning_rates(config, 200)
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) * 0.2, rtol=1e-6)
    assert (rates[9:150] == 2).all()
    np.testing.assert_allclose(rates[150:], np.arange(49, -1, -1) * 0.04, atol=1e-6)


def test_learning_rates_of_wsd_let_a_run_be_prolonged():
    config = OptimConfig(schedule="wsd", warmup_steps=10, decay_fraction=0.2)
    short, long = learning_rates(config, 100), learning_rates(config, 150)
    np.testing.assert_array_equal(short[:80], long[:80])
    assert long[80:120].max() == long[80:120].min() == np.float32(config.learning_rate)


@pytest.mark.parametrize("warmup", [0, 7])
def test_learning_rates_that_are_constant_only_warm_up(warmup):
    rates = learning_rates(OptimConfig(schedule="constant", warmup_steps=warmup), 30)
    assert (np.diff(rates) >= 0).all() and (rates[max(0, warmup - 1) :] == np.float32(1e-3)).all()
