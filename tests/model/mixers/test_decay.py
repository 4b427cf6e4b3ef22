import jax
import jax.numpy as jnp
import numpy as np

from inl_jax.model.mixers.decay import decay_scan


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
