import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inl_jax.model.language_model import abstract_params, unbox
from inl_jax.model.layers import layer_norm
from inl_jax.model.mixers import MIXERS, TokenSpan, decay_scan, last_real


def test_last_real_skips_the_padding():
    h = jnp.arange(12.0).reshape(2, 3, 2)
    assert (last_real(h, TokenSpan(None, None)) == h[:, 2]).all()
    found = last_real(h, TokenSpan(None, jnp.array([1, 3])))
    assert (found == jnp.stack([h[0, 0], h[1, 2]])).all()


def reference_context(config, params, x):
    """The mixers by their definitions, position by position, in numpy."""
    p = {k: np.asarray(v, np.float64) for k, v in params.items()}
    u = x @ p["kernel"] + p["bias"]
    if config.context == "mean":
        return np.stack([u[: i + 1].mean(axis=0) for i in range(len(u))])
    h, lam, out = np.zeros(u.shape[1]), 1 / (1 + np.exp(-p["decay_logit"])), []
    for u_i in u:
        h = lam * h + (1 - lam) * u_i
        out.append(h)
    return np.stack(out)


@pytest.mark.parametrize("context", ["mean", "decay"])
def test_mixers_follow_their_definitions(model_config, context):
    with jax.enable_x64(True):
        config = model_config(context=context, param_dtype="float64")
        mixer, tokens = MIXERS[context](config), TokenSpan(jnp.arange(20)[None], None)
        x = jax.random.normal(jax.random.key(1), (1, 20, config.d_model), jnp.float64)

        @jax.jit
        def both(x):
            boxed = mixer.init(jax.random.key(0), x, None, tokens)["params"]
            params = unbox(boxed)
            n = layer_norm(x, 1.0, 0.0) if context == "decay" else x
            return mixer.apply({"params": params}, x, None, tokens)[0], params, n

        found, params, n = both(x)
        np.testing.assert_allclose(found[0], reference_context(config, params, n[0]), rtol=1e-10)


def test_decay_scan_gradient_equals_autodiff_of_the_loop():
    def loop(u, decay, h):
        def body(h, u_i):
            h = decay * h + (1 - decay) * u_i
            return h, h

        return jnp.swapaxes(jax.lax.scan(body, h, jnp.swapaxes(u, 0, 1))[1], 0, 1)

    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 4)
        u = jax.random.normal(keys[0], (2, 13, 5), jnp.float64)
        decay = jax.random.uniform(keys[1], (5,), jnp.float64)
        h0 = jax.random.normal(keys[2], (2, 5), jnp.float64)
        g = jax.random.normal(keys[3], (2, 13, 5), jnp.float64)
        for ours, theirs in zip(
            jax.jit(lambda *a: jax.vjp(decay_scan, *a)[1](g))(u, decay, h0),
            jax.jit(lambda *a: jax.vjp(loop, *a)[1](g))(u, decay, h0),
            strict=True,
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-11)


@pytest.mark.parametrize("context", MIXERS)
def test_mixers_return_a_state_of_the_shapes_they_announce(model_config, context):
    config = model_config(context=context)
    mixer = MIXERS[context](config)
    x, tokens = jnp.ones((2, 3, config.d_model)), TokenSpan(jnp.arange(6).reshape(2, 3), None)
    announced = MIXERS[context].state_shapes(config, 2, 9)
    layer = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype),
        {"params": abstract_params(config)["blocks"]["context"]},
    )
    h, found = jax.eval_shape(mixer.apply, layer, x, announced, tokens)
    assert h.shape == x.shape
    assert found == announced
    assert jax.eval_shape(mixer.apply, layer, x, None, tokens)[1] is None
