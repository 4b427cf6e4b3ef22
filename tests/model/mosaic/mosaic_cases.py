"""Arrays for the integrator's kernels, and what XLA makes of them."""

import jax
import jax.numpy as jnp

from inl_jax.model.dynamics import CONTROLLERS, Dynamics

C, Q = 64, len(CONTROLLERS)
BF16 = jnp.dtype("bfloat16")


def arrays(tokens, width, *, num_iterations=1, rows=1, seed=0):
    """(params, context, x, s): what `dynamics.run` takes."""
    normal = jax.random.normal
    keys = iter(jax.random.split(jax.random.key(seed), 7))
    params = {
        "mu": 0.1 * normal(next(keys), (width,)),
        "state_kernel": normal(next(keys), (2, width, Q, C)) / width**0.5,
        "output_kernel": 0.1 * normal(next(keys), (Q, C, width)),
        "output_bias": normal(next(keys), (Q, width)),
    }
    context = normal(next(keys), (rows, tokens, Q, C)).astype(BF16)
    x = normal(next(keys), (rows, tokens, width))
    return params, context, x, 0.1 * normal(next(keys), (num_iterations, width))


def bfloat16(kappa=1.0):
    return Dynamics(0.1, kappa, BF16)


def distance(found, wanted):
    """The largest relative distance of two trees, leaf by leaf, in the Euclidean norm."""

    def of_leaf(a, b):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jnp.linalg.norm(a - b) / jnp.maximum(jnp.linalg.norm(b), 1e-30)

    return max(map(float, jax.tree.leaves(jax.tree.map(of_leaf, found, wanted))))
