"""Directories of exported models, as small as a test needs them."""

import json

import jax
import numpy as np

from inl_jax.interop.exported_config import to_json_fields
from inl_jax.interop.named_weights import named_leaves, named_views
from inl_jax.model.language_model import abstract_params
from inl_jax.tokens.tokenizer import load_tokenizer


def to_named(params, config):
    """The parameters by their exported names, each a contiguous copy."""
    views = named_views(params, config)
    return {name: np.ascontiguousarray(view) for name, view in views.items()}


def from_named(get, config):
    """The inverse of `to_named`, from a function of a name."""
    structure = jax.tree.structure(abstract_params(config))
    return jax.tree.unflatten(structure, named_leaves(get, config))


def write_exported(directory, params, config, *, shards=1, head=False, tokenizer=None):
    """Writes the model and its tokenizer, by default bytes; returns the directory."""
    named = to_named(params, config)
    if head:
        named["lm_head.weight"] = named["model.embed_tokens.weight"]
    (tokenizer or load_tokenizer("bytes")).save(directory)
    write_config(directory, to_json_fields(config) | {"model_type": "inl", "use_cache": True})
    write_arrays(directory, named, shards)
    return directory


def write_config(directory, fields):
    (directory / "config.json").write_text(json.dumps(fields))


def write_arrays(directory, named, shards=1):
    """Writes one file, or shards with their index."""
    from safetensors.numpy import save_file  # late: other tests here need no safetensors

    if shards == 1:
        save_file(named, directory / "model.safetensors")
        return
    places = {}
    for i, names in enumerate(np.array_split(list(named), shards), start=1):
        file = f"model-{i:05}-of-{shards:05}.safetensors"
        save_file({str(name): named[name] for name in names}, directory / file)
        places |= dict.fromkeys(map(str, names), file)
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
