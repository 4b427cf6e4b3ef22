"""Our parameters under the names and in the layouts of the PyTorch model that is exported.

A kernel there is `weight` of an `nn.Linear`, [out, in]; axes that form one side of a product are
joined. Nothing is computed, so that the way out and back is exact to the bit.

Shapes: D width, F feed-forward width, V vocabulary, Q controllers, C controller width, H query
heads, G key-value heads, K head width, L layers.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from inl_jax.config import ModelConfig
from inl_jax.model.dynamics import CONTROLLERS
from inl_jax.model.language_model import abstract_params, group_names

_OUTER = {  # ours: theirs
    "embedding": "model.embed_tokens.weight",
    "final_norm_scale": "model.norm.weight",
    "final_norm_bias": "model.norm.bias",
}
# In a block, by our path: their name in a layer, and how many axes of ours are inputs of a product;
# None for what is no kernel and keeps its shape.
_INNER: dict[tuple[str, ...], tuple[str, int | None]] = {
    ("context", "norm_scale"): ("context.norm.weight", None),
    ("context", "norm_bias"): ("context.norm.bias", None),
    ("context", "kernel"): ("context.proj.weight", 1),
    ("context", "bias"): ("context.proj.bias", None),
    ("context", "decay_logit"): ("context.decay_logit", None),
    ("context", "decay_kernel"): ("context.decay_proj.weight", 1),
    ("context", "gate_kernel"): ("context.gate_proj.weight", 1),
    ("context", "out_kernel"): ("context.out_proj.weight", 1),
    ("context", "query_kernel"): ("context.q_proj.weight", 1),
    ("context", "key_kernel"): ("context.k_proj.weight", 1),
    ("context", "value_kernel"): ("context.v_proj.weight", 1),
    ("context", "output_kernel"): ("context.o_proj.weight", 2),
    ("context", "query_scale"): ("context.q_norm.weight", None),
    ("context", "key_scale"): ("context.k_norm.weight", None),
    ("norm1_scale",): ("norm1.weight", None),
    ("norm1_bias",): ("norm1.bias", None),
    ("integrator", "mu"): ("integrator.mu", None),
    ("integrator", "gamma"): ("integrator.gamma", None),
    ("integrator", "phi"): ("integrator.phi", None),
    ("integrator", "context_kernel"): ("integrator.context_proj.weight", 1),
    ("integrator", "hidden_bias"): ("integrator.context_proj.bias", 0),
    ("integrator", "state_kernel"): ("integrator.state_proj.weight", 2),
    ("norm2_scale",): ("norm2.weight", None),
    ("norm2_bias",): ("norm2.bias", None),
    ("up_kernel",): ("feed_forward.up_proj.weight", 1),
    ("up_bias",): ("feed_forward.up_proj.bias", None),
    ("down_kernel",): ("feed_forward.down_proj.weight", 1),
    ("down_bias",): ("feed_forward.down_proj.bias", None),
}
# Each controller has an `nn.Linear` of its own there: [Q, C, D] is Q times [D, C].
_BY_CONTROLLER = {
    ("integrator", "output_kernel"): ("integrator.out_proj.{}.weight", 1),
    ("integrator", "output_bias"): ("integrator.out_proj.{}.bias", None),
}


class Weight(NamedTuple):
    """One array there, and where it comes from."""

    name: str
    path: tuple[str, ...]  # of our leaf
    index: tuple[int, ...]  # into the leaf: the layer or group, and the controller
    num_inputs: int | None  # as in `_INNER`
    shape: tuple[int, ...]  # of the leaf at `index`

    @property
    def exported_shape(self) -> tuple[int, ...]:
        """Its shape there."""
        n, shape = self.num_inputs, self.shape
        if n is None:
            return shape
        return (math.prod(shape[n:]), math.prod(shape[:n])) if n else (math.prod(shape),)

    def exported(self, leaf: np.ndarray) -> np.ndarray:
        """The array there, from our leaf at `index`."""
        if self.num_inputs is None:
            return leaf
        if self.num_inputs == 0:
            return leaf.reshape(-1)
        return leaf.reshape(math.prod(leaf.shape[: self.num_inputs]), -1).T

    def imported(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `exported`."""
        return array.T.reshape(self.shape) if self.num_inputs else array.reshape(self.shape)


def weights_of(config: ModelConfig) -> list[Weight]:
    """Every array of the exported model, without the tied head."""
    found, members = [], group_names(config)
    for path, leaf in _by_path(abstract_params(config)).items():
        first, *rest = path
        if first != "blocks":
            found.append(Weight(_OUTER[first], path, (), None, leaf.shape))
            continue
        member = members.index(rest.pop(0)) if members else 0
        names = _names(tuple(rest))
        found += [
            Weight(f"model.layers.{layer}.{name}", path, (i, *index), num_inputs, shape)
            for i, layer in enumerate(range(member, config.num_layers, len(config.mixers)))
            for name, index, num_inputs in names
            for shape in [leaf.shape[1 + len(index) :]]
        ]
    return found


def _names(path: tuple[str, ...]) -> list[tuple[str, tuple[int, ...], int | None]]:
    """The arrays in a layer there that a leaf of a block becomes: name, index, `num_inputs`."""
    if path in _INNER:
        name, num_inputs = _INNER[path]
        return [(name, (), num_inputs)]
    name, num_inputs = _BY_CONTROLLER[path]
    return [(name.format(k), (q,), num_inputs) for q, k in enumerate(CONTROLLERS)]


def named_views(params: Any, config: ModelConfig) -> dict[str, np.ndarray]:
    """The parameters by their names there, in their own types: views, of any strides.

    Args:
      params: as `init_params` makes them, on one device or the host.
      config: their architecture.
    """
    leaves = {path: np.asarray(leaf) for path, leaf in _by_path(params).items()}
    return {w.name: w.exported(leaves[w.path][w.index]) for w in weights_of(config)}


def named_leaves(get: Callable[[str], np.ndarray], config: ModelConfig) -> Iterator[np.ndarray]:
    """The inverse of `named_views`: the leaves of the tree in their order, one at a time.

    Args:
      get: the array of a name, of its `Weight.exported_shape`; called once for each.
      config: the architecture.
    """
    shapes = {path: leaf.shape for path, leaf in _by_path(abstract_params(config)).items()}
    for path, weights in itertools.groupby(weights_of(config), key=lambda weight: weight.path):
        leaf = None
        for weight in weights:
            array = weight.imported(get(weight.name))
            leaf = np.empty(shapes[path], array.dtype) if leaf is None else leaf
            leaf[weight.index] = array
        yield leaf


def _by_path(tree: Any) -> dict[tuple[str, ...], Any]:
    return {
        tuple(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
