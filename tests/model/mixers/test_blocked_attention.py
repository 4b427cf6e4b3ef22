import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inl_jax.model.mixers.blocked_attention import blocked_attention


def by_jax(q_BGRSK, k_BGSK, v_BGSK):
    B, G, R, S, K = q_BGRSK.shape
    q_BSHK = jnp.moveaxis(q_BGRSK, 3, 1).reshape(B, S, G * R, K)
    k_BSGK, v_BSGK = k_BGSK.swapaxes(1, 2), v_BGSK.swapaxes(1, 2)
    o_BSHK = jax.nn.dot_product_attention(q_BSHK, k_BSGK, v_BSGK, is_causal=True)
    return jnp.moveaxis(o_BSHK.reshape(B, S, G, R, K), 1, 3)


def arrays(num_tokens, dtype=float):
    q = jax.random.normal(jax.random.key(0), (2, 2, 3, num_tokens, 4), dtype)
    k, v, do = (
        jax.random.normal(jax.random.key(i), shape, dtype)
        for i, shape in enumerate((q[:, :, 0].shape, q[:, :, 0].shape, q.shape), 1)
    )
    return (q, k, v), do


def with_gradient(function, qkv, do):
    o, pullback = jax.vjp(function, *qkv)
    return o, pullback(do)


@pytest.mark.parametrize("num_tokens", [1, 150])  # less than a block; the last of three is short
def test_blocked_attention_and_its_gradient_equal_jaxs(num_tokens):
    with jax.enable_x64(True):
        given = arrays(num_tokens)
        found, wanted = (
            jax.jit(functools.partial(with_gradient, f))(*given)
            for f in (blocked_attention, by_jax)
        )
        # JAX's softmax is in float32, whatever the arguments are.
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
        jax.tree.map(close, found, wanted)


def test_blocked_attention_holds_the_scores_of_one_block_at_a_time():
    program = jax.make_jaxpr(functools.partial(with_gradient, blocked_attention))(*arrays(512))
    assert ",128,512]" in str(program) and ",512,512]" not in str(program)


def test_blocked_attention_has_the_types_of_its_arguments():
    (q, k, v), do = arrays(80, jnp.bfloat16)
    found = jax.eval_shape(functools.partial(with_gradient, blocked_attention), (q, k, v), do)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), found) == jax.tree.map(
        lambda a: (a.shape, a.dtype), (do, (q, k, v))
    )
