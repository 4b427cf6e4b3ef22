import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from lively import lively_params
from mixer_cases import FIELDS, PATTERN

import inl_jax
from inl_jax.config import InputError, ModelConfig
from inl_jax.config_file import load_config, presets
from inl_jax.model import language_model as model
from inl_jax.model.layers import layer_norm
from inl_jax.model.losses import token_losses
from inl_jax.model.mixers.span import LayerState, TokenSpan
from inl_jax.model.platform.device import H100, made_for

SLOW = pytest.mark.slow
ONE_QUICK = [mixer if mixer == PATTERN else pytest.param(mixer, marks=SLOW) for mixer in FIELDS]
CASES = [(m, t) for m, t in itertools.product(FIELDS, (0, 1, 3)) if (m, t) != ("mean", 0)]
QUICK_CASES = [("mean", 1), ("decay", 3), (PATTERN, 0)]

PUBLISHED = {
    "small": 43_087_872,
    "medium": 111_896_832,
    "large": 303_547_392,
    "xlarge": 807_850_496,
    "3b": 1_698_168_832,
    "4b": 2_524_171_008,
}


def named(name, **fields):
    """The model of a shipped config."""
    return dataclasses.replace(load_config(name).model, **fields)


@pytest.mark.parametrize("name", PUBLISHED)
def test_param_count_equals_the_published_sizes(name):
    published = inl_jax.param_count(named(name, context="mean"))
    assert published == PUBLISHED[name]
    decay = named(name)
    assert decay.context == "decay"
    assert inl_jax.param_count(decay) == published + 3 * decay.num_layers * decay.d_model
    # Attention: four projections and two head scales instead of one projection and its bias.
    a = named(name, context="attention")
    D, K = a.d_model, a.head_dim
    projections = 2 * D * (a.num_heads + a.num_kv_heads) * K + 2 * K + 2 * D
    attention = published + a.num_layers * (projections - D * D - D)
    assert inl_jax.param_count(a) == attention
    # Three square matrices more than decay: for the rate, the gate and the output.
    gated = inl_jax.param_count(decay) + 3 * decay.num_layers * D * D
    assert inl_jax.param_count(named(name, context="gated")) == gated
    n = 4 if decay.num_layers % 4 == 0 else 3
    mixed = ((n - 1) * gated + attention) // n
    note = " ".join(presets()[name].read_text().split())
    assert f"mean, as published: {published:,}; attention: {attention:,}; gated: {gated:,};" in note
    assert f"gated and --model.attention_every {n}: {mixed:,}." in note


def test_param_count_of_a_pattern_is_that_of_its_layers():
    counts = [inl_jax.param_count(named("small", context=c)) for c in ("gated", "attention")]
    both = inl_jax.param_count(named("small", context="gated", attention_every=2))
    assert 2 * both == sum(counts)


def test_by_layer_gives_the_layers_in_their_order(model_config):
    config = model_config(context="gated", num_layers=4, attention_every=2)
    groups = {"layer_0": {"part": [np.array([0, 2])]}, "layer_1": {"part": [np.array([1, 3])]}}
    (found,) = model.by_layer(config, groups, "part")
    assert found.tolist() == [0, 1, 2, 3]
    plain = model.by_layer(model_config(), {"part": [np.arange(2)]}, "part")
    assert plain[0].tolist() == [0, 1]


def test_param_count_depends_on_iterations_only_at_zero():
    some, more, none = (named("small", num_iterations=t) for t in (1, 9, 0))
    assert inl_jax.param_count(some) == inl_jax.param_count(more)
    D, C = none.d_model, none.controller_width
    integrator = 2 * D + 3 * D + 4 * (3 * D * C + C + C * D + D)  # with the norm before it
    assert inl_jax.param_count(some) - inl_jax.param_count(none) == none.num_layers * integrator


@pytest.mark.parametrize("mixer", ["gated", pytest.param("decay", marks=SLOW)])
def test_init_params_has_the_documented_scales(mixer):
    fields = {"d_model": 128, "d_ff": 256, "num_layers": 2, "max_seq_len": 512}
    config = ModelConfig(vocab_size=500, context=mixer, **fields)
    params = inl_jax.init_params(config, jax.random.key(0))
    block = params["blocks"]

    def close(array, std):
        np.testing.assert_allclose(np.std(array), std, rtol=0.05)

    close(params["embedding"], 128**-0.5)
    close(block["up_kernel"], 128**-0.5)
    close(block["down_kernel"], (2 * 2 * 256) ** -0.5)
    close(block["context"]["kernel"], 128**-0.5)
    if mixer == "gated":
        close(block["context"]["decay_kernel"], 128**-0.5)
        close(block["context"]["gate_kernel"], 128**-0.5)
        close(block["context"]["out_kernel"], (2 * 2 * 128) ** -0.5)
    close(block["integrator"]["context_kernel"], (3 * 128) ** -0.5)
    close(block["integrator"]["state_kernel"], (3 * 128) ** -0.5)
    close(block["integrator"]["output_kernel"], 0.01)
    np.testing.assert_allclose(np.std(block["integrator"]["gamma"]), 0.1, rtol=0.2)
    assert 0 <= block["integrator"]["phi"].min() and block["integrator"]["phi"].max() < 2 * np.pi
    tau = -1 / jnp.log(jax.nn.sigmoid(block["context"]["decay_logit"][0]))
    np.testing.assert_allclose(tau, np.geomspace(1, 512, 128), rtol=2e-3)
    assert not jnp.array_equal(block["up_kernel"][0], block["up_kernel"][1])
    again = inl_jax.init_params(config, jax.random.key(0))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, params, again))


@pytest.mark.parametrize(
    ("mixer", "num_iterations"),
    [case if case in QUICK_CASES else pytest.param(*case, marks=SLOW) for case in CASES],
)
def test_hidden_states_read_no_later_token_and_no_other_row(model_config, mixer, num_iterations):
    """Logits at (row 0, i) have gradient 0 for every embedding after i and in any other row."""
    config = model_config(**FIELDS[mixer], num_iterations=num_iterations)
    params = inl_jax.init_params(config, jax.random.key(0))
    S, i = 9, 4
    ids = jnp.arange(2 * S).reshape(2, S)  # all different, so that each has its own embedding row

    def chosen(embedding):  # the head is held still: only what is read of the inputs counts
        hidden = model.hidden_states(config, params | {"embedding": embedding}, ids)
        weights = jax.random.normal(jax.random.key(1), hidden.shape[-1:])
        return hidden[0, i] @ weights

    reads = jnp.abs(jax.jit(jax.grad(chosen))(params["embedding"])).max(axis=-1)
    assert (reads[: i + 1] > 0).all(), "an earlier token is not read"
    assert (reads[i + 1 :] == 0).all(), "a later token, or another row, is read"


def test_decode_never_needs_cudnn(model_config):
    """On CUDA in float32, which cuDNN attention does not take."""
    with made_for(H100):
        config = model_config(context="attention", compute_dtype="float32")
        params = inl_jax.init_params(config, jax.random.key(0))
        state = model.init_decode_state(config, 1, 8)
        decode = jax.jit(functools.partial(model.decode, config))
        assert jnp.isfinite(decode(params, state, jnp.ones((1, 3), int))[0]).all()


def test_decode_never_needs_the_kernels_of_the_integrator(model_config):
    """Of a model that was trained by them, on a machine that cannot run them."""
    config = model_config(integrator_kernel="mosaic", controller_width=64, d_model=32)
    params = inl_jax.init_params(config, jax.random.key(0))
    decode = functools.partial(model.decode, config)
    logits, _ = jax.eval_shape(
        decode, params, model.init_decode_state(config, 1, 8), jnp.ones((1, 3), int)
    )
    assert logits.shape == (1, config.vocab_size)
    with pytest.raises(InputError, match="integrator_kernel=mosaic needs a Hopper GPU"):
        jax.eval_shape(functools.partial(model.apply, config), params, jnp.ones((1, 3), int))


def loss_and_grad(config, params, ids, dropout_key=None):
    def loss(params):
        hidden = model.hidden_states(config, params, ids[:, :-1], dropout_key=dropout_key)
        return token_losses(params, hidden, ids[:, 1:]).mean()

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", FIELDS)
def test_remat_changes_nothing_but_memory(model_config, mixer):
    ids = jax.random.randint(jax.random.key(0), (2, 12), 0, 300)
    kept = model_config(**FIELDS[mixer])
    params = inl_jax.init_params(kept, jax.random.key(0))
    wanted = loss_and_grad(kept, params, ids)
    for remat in ("integrator", "all_but_integrator", "block"):
        found = loss_and_grad(dataclasses.replace(kept, remat=remat), params, ids)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, wanted
        )


def equations(jaxpr, primitive):
    """The parameters of all equations of this primitive in a program, nested ones included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == primitive:
            yield eqn.params
        for sub in jaxprs_in_params(eqn.params):
            yield from equations(sub, primitive)


def gradient_program(config):
    params, ids = model.abstract_params(config), jnp.zeros((2, 12), jnp.int32)
    return jax.make_jaxpr(jax.grad(lambda p: model.hidden_states(config, p, ids).sum()))(params)


@pytest.mark.parametrize(
    "remat, runs", [("none", 1), ("integrator", 2), ("all_but_integrator", 1), ("block", 2)]
)
@pytest.mark.parametrize("mixer", ["decay", pytest.param(PATTERN, marks=SLOW)])
def test_remat_runs_the_iterations_as_often_as_it_says(model_config, remat, runs, mixer):
    """`runs` counts forward scans; the gradient's own scan is one more."""
    config = model_config(**FIELDS[mixer], remat=remat, num_iterations=6)
    lengths = [scan["length"] for scan in equations(gradient_program(config).jaxpr, "scan")]
    # The first step is not in the scan.
    assert lengths.count(5) == len(config.mixers) * (runs + 1)


def test_remat_saves_memory_in_order(model_config):
    """The number of values kept for the backward pass, counted from shapes."""

    def kept(remat, segment=1):
        config = model_config(
            remat=remat, integrator_segment=segment, num_iterations=9, num_layers=3, d_model=64
        )
        ids = jnp.zeros((1, 32), jnp.int32)
        params = model.abstract_params(config)
        forward = functools.partial(model.hidden_states, config)
        _, pullback = jax.eval_shape(lambda p: jax.vjp(lambda p: forward(p, ids), p), params)
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(pullback))

    order = [kept("none"), kept("all_but_integrator"), kept("all_but_integrator", 4), kept("block")]
    assert order == sorted(order, reverse=True) and len(set(order)) == len(order), order
    assert kept("block") < kept("integrator") < kept("none", 4) < kept("none")


def test_remat_none_keeps_only_products_on_a_cpu(model_config):
    """The stream, q, k, v, attention's output and sums, h and z."""
    config = model_config(context="attention", remat="none", num_iterations=0, d_ff=96)
    program = gradient_program(config)
    forward = next(e for e in program.jaxpr.eqns if e.primitive.name == "scan")
    stacks = forward.outvars[forward.params["num_carry"] :]
    D, H, k = config.d_model, config.num_heads, config.num_kv_heads * config.head_dim
    kept, tokens = sum(math.prod(a.aval.shape) for a in stacks), 2 * 12
    assert kept == config.num_layers * tokens * (D + (D + k + k) + (D + H) + D + config.d_ff)


@pytest.mark.parametrize(
    "mixer", [PATTERN, *(pytest.param(m, marks=SLOW) for m in ("decay", "gated", "attention"))]
)
def test_remat_none_computes_no_product_again_on_a_cpu(model_config, mixer):
    """Its gradient has as many as that of a device which keeps everything."""
    config = model_config(**FIELDS[mixer], remat="none", num_iterations=0, attention_kernel="xla")

    def products():
        return len(list(equations(gradient_program(config).jaxpr, "dot_general")))

    on_a_cpu = products()
    with made_for(H100):
        assert on_a_cpu == products()


@pytest.mark.parametrize("mixer", ONE_QUICK)
def test_program_size_does_not_grow_with_layers_or_iterations(model_config, mixer):
    def size(**fields):
        config = model_config(**FIELDS[mixer], remat="block", **fields)
        params = model.abstract_params(config)
        ids = jax.ShapeDtypeStruct((2, 12), jnp.int32)
        loss = lambda p, ids: token_losses(p, model.hidden_states(config, p, ids), ids).mean()  # noqa: E731
        return len(jax.jit(jax.grad(loss)).lower(params, ids).as_text().splitlines())

    assert size(num_layers=12, num_iterations=15) == size(num_layers=4, num_iterations=6)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", FIELDS)
def test_gradient_is_finite_in_bfloat16_at_full_depth(model_config, mixer):
    """40 layers of 15 iterations, as in the 3b, but narrow. Every parameter gets a gradient."""
    config = model_config(
        **FIELDS[mixer],
        num_layers=40,
        num_iterations=15,
        param_dtype="bfloat16",
        compute_dtype="bfloat16",
        remat="block",
    )
    params = inl_jax.init_params(config, jax.random.key(0))
    assert all(p.dtype == jnp.bfloat16 for p in jax.tree.leaves(params))
    ids = jax.random.randint(jax.random.key(0), (1, 17), 0, 300)
    loss, grads = loss_and_grad(config, params, ids)
    assert jnp.isfinite(loss)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert jnp.isfinite(leaf).all(), path
        assert jnp.abs(leaf).max() > 0, path


@pytest.mark.parametrize("mixer", ONE_QUICK)
def test_logits_are_float32_and_close_in_bfloat16(model_config, mixer):
    ids = jax.random.randint(jax.random.key(0), (2, 12), 0, 300)
    exact = model_config(**FIELDS[mixer])
    rough = dataclasses.replace(exact, compute_dtype="bfloat16")
    params = inl_jax.init_params(exact, jax.random.key(0))
    apply = jax.jit(inl_jax.apply, static_argnums=0)
    wanted, found = apply(exact, params, ids), apply(rough, params, ids)
    assert wanted.dtype == found.dtype == jnp.float32
    assert 0 < jnp.abs(wanted - found).max() < 0.1


@pytest.mark.parametrize("mixer", ONE_QUICK)
def test_dropout_acts_only_with_a_key_and_differs_between_keys(model_config, mixer):
    config = model_config(**FIELDS[mixer], dropout=0.5, num_iterations=1)
    params = inl_jax.init_params(config, jax.random.key(0))
    ids = jnp.arange(8)[None]

    @functools.partial(jax.jit, static_argnums=0)
    def hidden(config, key):
        return model.hidden_states(config, params, ids, dropout_key=key)

    run = functools.partial(hidden, config)
    without = dataclasses.replace(config, dropout=0.0)
    np.testing.assert_array_equal(run(None), hidden(without, None))
    a, b = run(jax.random.key(1)), run(jax.random.key(2))
    assert not jnp.allclose(a, b) and not jnp.allclose(a, run(None))
    np.testing.assert_array_equal(a, run(jax.random.key(1)))


def test_amplitude_is_a_runtime_scalar(model_config):
    config = model_config(num_iterations=1)
    params = inl_jax.init_params(config, jax.random.key(0))
    ids = jnp.arange(8)[None]
    run = jax.jit(lambda a: inl_jax.apply(config, params, ids, amplitude=a))
    by_config = jax.jit(inl_jax.apply, static_argnums=0)(config, params, ids)
    np.testing.assert_allclose(run(config.excitation_amplitude), by_config, rtol=1e-4, atol=1e-5)
    assert not jnp.allclose(run(0.0), run(1.0))
    assert run._cache_size() == 1


@pytest.mark.parametrize("mixer", ONE_QUICK)
def test_tokens_stop_by_what_they_have_read_alone(model_config, mixer):
    """Decoding gives the logits of the whole pass, and no later token changes an earlier one."""
    config = model_config(**FIELDS[mixer], num_iterations=6, tol=0.2)
    params = lively_params(config)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (3, 12), np.int32)
    run = jax.jit(model.hidden_states_and_steps, static_argnums=0)
    hidden, steps = run(config, params, ids)
    assert len(np.unique(steps)) > 1
    other, other_steps = run(config, params, np.hstack([ids[:, :6], ids[:, 6:] + 1]))
    np.testing.assert_array_equal(hidden[:, :6], other[:, :6])
    np.testing.assert_array_equal(steps[:, :, :6], other_steps[:, :, :6])
    state, decode = model.init_decode_state(config, 3, 12), jax.jit(model.decode, static_argnums=0)
    for i in range(12):
        logits, state = decode(config, params, state, ids[:, i : i + 1])
        wanted = model.logits(params, hidden[:, i])
        np.testing.assert_allclose(logits, wanted, rtol=1e-3, atol=1e-3)


def test_steps_stand_in_the_order_of_the_layers(model_config):
    """Of a pattern, too: a layer that moves no token takes one step."""
    config = model_config(context="decay", attention_every=2, num_layers=4, tol=1e-3)
    params, still = lively_params(config), 2
    integrator = dict(params["blocks"]["layer_0"]["integrator"])
    for name, value in (("output_kernel", 0.0), ("output_bias", -100.0)):  # gate and beta are 0
        integrator[name] = integrator[name].at[still // 2].set(value)
    layer = params["blocks"]["layer_0"] | {"integrator": integrator}
    params = params | {"blocks": params["blocks"] | {"layer_0": layer}}
    ids = np.arange(8)[None]
    _, steps = jax.jit(model.hidden_states_and_steps, static_argnums=0)(config, params, ids)
    assert steps.shape == (4, 1, 8)
    assert [bool((of_layer == 1).all()) for of_layer in steps] == [i == still for i in range(4)]


def test_model_whose_tokens_stop_early_has_no_gradient(model_config):
    config = model_config(tol=0.1)
    total = lambda p: model.hidden_states(config, p, np.zeros((1, 4), np.int32)).sum()  # noqa: E731
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        jax.eval_shape(jax.grad(total), model.abstract_params(config))


def reference_context(config, params, x):
    """The mixers by their definitions, position by position, in numpy."""
    p = {k: np.asarray(v, np.float64) for k, v in params.items()}
    u = x @ p["kernel"] + p["bias"]
    if config.context == "mean":
        return np.stack([u[: i + 1].mean(axis=0) for i in range(len(u))])
    logit = p["decay_logit"] + (x @ p["decay_kernel"] if config.context == "gated" else 0 * u)
    h, out = np.zeros(u.shape[1]), []
    for lam, u_i in zip(1 / (1 + np.exp(-logit)), u, strict=True):
        h = lam * h + (1 - lam) * u_i
        out.append(h)
    if config.context == "decay":
        return np.stack(out)
    gate = x @ p["gate_kernel"]
    return (np.stack(out) * gate / (1 + np.exp(-gate))) @ p["out_kernel"]


@pytest.mark.parametrize("context", ["mean", "decay", "gated"])
def test_mixers_follow_their_definitions(model_config, context):
    with jax.enable_x64(True):
        config = model_config(context=context, param_dtype="float64")
        mixer, tokens = model.MIXERS[context](config), TokenSpan(jnp.arange(20)[None], None)
        x = jax.random.normal(jax.random.key(1), (1, 20, config.d_model), jnp.float64)

        @jax.jit
        def both(x):
            boxed = mixer.init(jax.random.key(0), x, None, tokens)["params"]
            params = model.unbox(boxed)
            n = x if context == "mean" else layer_norm(x, 1.0, 0.0)
            return mixer.apply({"params": params}, x, None, tokens)[0], params, n

        found, params, n = both(x)
        np.testing.assert_allclose(found[0], reference_context(config, params, n[0]), rtol=1e-10)


@pytest.mark.parametrize("context", model.MIXERS)
def test_mixers_return_a_state_of_the_shapes_they_announce(model_config, context):
    config = model_config(context=context)
    mixer = model.MIXERS[context](config)
    x, tokens = jnp.ones((2, 3, config.d_model)), TokenSpan(jnp.arange(6).reshape(2, 3), None)
    before = jax.eval_shape(lambda: model.init_decode_state(config, 2, 9)).layers
    state = LayerState(before, jax.ShapeDtypeStruct((), jnp.int32))
    layer = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype),
        {"params": model.abstract_params(config)["blocks"]["context"]},
    )
    h, found = jax.eval_shape(mixer.apply, layer, x, state, tokens)
    assert h.shape == x.shape
    assert found == mixer.state_shapes(config, 2, 3)  # of attention: the entries of 3 tokens
    assert jax.eval_shape(mixer.apply, layer, x, None, tokens)[1] is None
