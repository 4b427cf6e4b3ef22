import jax.numpy as jnp

from inl_jax.model.mixers.span import TokenSpan, last_real


def test_last_real_skips_the_padding():
    h = jnp.arange(12.0).reshape(2, 3, 2)
    assert (last_real(h, TokenSpan(None, None)) == h[:, 2]).all()
    found = last_real(h, TokenSpan(None, jnp.array([1, 3])))
    assert (found == jnp.stack([h[0, 0], h[1, 2]])).all()
