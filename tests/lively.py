"""Models whose weights leave no part silent, and runs that hold them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from inl_jax.model import language_model as model
from inl_jax.storage.checkpoint import Checkpoints
from inl_jax.storage.run_dir import record_run
from inl_jax.tokens.tokenizer import load_tokenizer


@functools.cache
def lively_params(config):
    """Random weights in which no part of the model is silent and the embedding does not rule."""
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        size = 0.1 if path[-1].key.endswith(("embedding", "bias")) else 0.5
        value = path[-1].key.endswith("scale") + size * rng.normal(size=shape.shape)
        return jnp.asarray(value, shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, model.abstract_params(config))


def published_params(config):
    """`lively_params` with a harmonic that stands still, as in the published model."""
    params = lively_params(config)
    gamma = np.zeros_like(params["blocks"]["integrator"]["gamma"])
    integrator = params["blocks"]["integrator"] | {"gamma": gamma}
    return params | {"blocks": params["blocks"] | {"integrator": integrator}}


def save_run(config):
    """A run directory with `lively_params`, which are returned, and the bytes tokenizer."""
    params = lively_params(config.model)
    record_run(config, load_tokenizer("bytes"))
    saved = Checkpoints(config.run_dir, keep_last=1)
    saved.save(1, params, {"step": jnp.zeros((), jnp.int32)}, position={})
    saved.close()
    return params
