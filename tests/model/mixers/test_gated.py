import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inl_jax.model.mixers.gated import gated_scan

LOGITS = np.array([-800.0, -40.0, -1.0, 2.0, 8.0, 30.0])
"""Decays from 0 to almost 1: as float64 the first is 0, and the last 1 - 1e-13."""


def loop(u, z, logit, h):
    def body(h, token):
        u_i, z_i = token
        h = jax.nn.sigmoid(logit + z_i) * h + jax.nn.sigmoid(-logit - z_i) * u_i
        return h, h

    return jnp.swapaxes(jax.lax.scan(body, h, (u.swapaxes(0, 1), z.swapaxes(0, 1)))[1], 0, 1)


def arguments(positions, dtype, rows=2):
    """u, z, the logits, h0, and dh."""
    rng = np.random.default_rng(0)
    u, z, dh = rng.normal(size=(3, rows, positions, LOGITS.size))
    h0 = rng.normal(size=(rows, LOGITS.size))
    return [jnp.asarray(a, dtype) for a in (u, z, LOGITS, h0, dh)]


@pytest.mark.parametrize("positions", [1, 13, 70])
def test_gated_scan_and_its_gradient_equal_the_loop(positions):
    with jax.enable_x64(True):
        *given, dh = arguments(positions, jnp.float64)

        def both(scan):
            h, gradient = jax.vjp(scan, *given)
            return h, *gradient(dh)

        for ours, theirs in zip(
            jax.jit(both, static_argnums=0)(gated_scan), both(loop), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-13)


def test_gated_scan_stays_close_in_float32_over_a_long_sequence():
    """A decay near 1 is rounded by 3e-8, which adds up over some 1 / (1 - lam) tokens alone."""
    with jax.enable_x64(True):
        *given, _ = arguments(4096, jnp.float32, rows=1)
        found = jax.jit(gated_scan)(*given)
        exact = jax.jit(loop)(*(a.astype(jnp.float64) for a in given))
        error = jnp.abs(found - exact).max(axis=(0, 1)) / jnp.abs(exact).max(axis=(0, 1))
        assert found.dtype == jnp.float32 and error.max() < 1e-5, error
