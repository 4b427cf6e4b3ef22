import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inl_jax.model.mixers.decay import decay_scan


def loop(u, decay, h):
    def body(h, u_i):
        h = decay * h + (1 - decay) * u_i
        return h, h

    return jnp.swapaxes(jax.lax.scan(body, h, jnp.swapaxes(u, 0, 1))[1], 0, 1)


@pytest.mark.parametrize("positions", [1, 13, 70])
def test_decay_scan_and_its_gradient_equal_the_loop(positions):
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 3)
        decay = jnp.array([0.0, 1e-30, np.exp(-1.0), 0.9, np.exp(-1 / 4096), 1 - 1e-12])
        u, g = jax.random.normal(keys[0], (2, 2, positions, decay.size), jnp.float64)
        h0 = jax.random.normal(keys[1], (2, decay.size), jnp.float64)

        def both(scan):
            h, gradient = jax.vjp(scan, u, decay, h0)
            return h, *gradient(g)

        for ours, theirs in zip(
            jax.jit(both, static_argnums=0)(decay_scan), both(loop), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-13)
