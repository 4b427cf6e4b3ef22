"""Parameters, inputs and comparisons that the tests of the integrator share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from inl_jax.model.dynamics import CONTROLLERS, Dynamics
from inl_jax.model.integrator import Integrator, integrate
from inl_jax.model.language_model import unbox

F32 = jnp.dtype("float32")
F64 = jnp.dtype("float64")


@functools.partial(jax.jit, static_argnums=(0, 1))
def layer_params(config, key=0, scale=0.0):
    """Parameters of one layer; `scale` adds noise to every leaf, so that none is at a zero."""
    ones = jnp.ones((1, 1, config.d_model))
    layer = Integrator(config)
    params = unbox(layer.init(jax.random.key(key), ones, ones, amplitude=0.0, dtype=F32)["params"])
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(key + 1), len(leaves))
    noisy = [
        x + scale * jax.random.normal(k, x.shape, x.dtype)
        for x, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, noisy)


def inputs(config, dtype, *, batch=2, positions=5):
    """(parameters, context, initial state), all of them random."""
    h, x = jax.random.normal(jax.random.key(5), (2, batch, positions, config.d_model), F32)
    return jax.tree.map(lambda a: a.astype(dtype), (layer_params(config, scale=0.3), h, x))


def reference(params, h, x, *, amplitude, num_iterations, dt, kappa):
    """The equations of one token, written out with loops, in numpy float64."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    x, v = np.array(x, np.float64), np.zeros(len(x))
    for t in range(num_iterations):
        o = {}
        for q, name in enumerate(CONTROLLERS):
            kernel = np.concatenate([p["context_kernel"][:, q], *p["state_kernel"][:, :, q]])
            r = np.maximum(np.concatenate([h, x, v]) @ kernel + p["hidden_bias"][q], 0)
            o[name] = r @ p["output_kernel"][q] + p["output_bias"][q]
        e = x - p["mu"]
        alpha = 1 / (1 + np.exp(-o["alpha"])) * (1 - np.exp(-kappa * np.sqrt(np.mean(e**2))))
        beta = np.minimum(np.log1p(np.exp(o["beta"])), 2 / dt)
        gate = 1 / (1 + np.exp(-o["gate"]))
        s = amplitude * np.sin(p["gamma"] * t + p["phi"])
        v = alpha * v + (1 - alpha) * o["candidate"] - beta * e + s
        x = x + dt * gate * v
    return x


def value_and_gradients(params, h, x, *, amplitude=0.03, kappa=1.0, dtype, **options):
    """A weighted sum of `integrate`; its gradients by parameters, context, state and amplitude."""
    weights = jax.random.normal(jax.random.key(9), x.shape, F32)

    def total(params, h, x, amplitude):
        out = integrate(
            params, h, x, amplitude=amplitude, dynamics=Dynamics(0.1, kappa, dtype), **options
        )
        return (out * weights).sum()

    both = jax.jit(jax.value_and_grad(total, (0, 1, 2, 3)))
    return both(params, h, x, jnp.asarray(amplitude, x.dtype))


def assert_close(found, wanted, tolerance):
    """Relative in the norm of each leaf; a leaf that should be zero is compared with 1."""
    named = jax.tree_util.tree_leaves_with_path(wanted)
    for (path, b), a in zip(named, jax.tree.leaves(found), strict=True):
        a, b = (np.asarray(leaf, np.float64) for leaf in (a, b))
        error = np.linalg.norm(a - b) / (np.linalg.norm(b) or 1.0)
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error}"
