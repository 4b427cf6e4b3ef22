"""Published PyTorch weights in and out.

The published model is the mean context. Linear weights there are [out, in]; its logits come from
an unscaled embedding, so the square root of D moves between the embedding and the final norm.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from inl_jax.checks import InputError, require
from inl_jax.config import ModelConfig
from inl_jax.console import first_line
from inl_jax.model.dynamics import CONTROLLERS
from inl_jax.model.language_model import abstract_params
from inl_jax.model.layers import sinusoid

_NETWORKS = dict(zip(CONTROLLERS, ("alpha", "beta", "gate", "v_cand"), strict=True))
EMBEDDING = "token_embedding.weight"
HEAD = "lm_head.weight"
POSITIONS = "pos_encoding.pe"
_COUNTER = "inl.global_step"
_INSTEAD = "export a directory for transformers instead, which can hold any model"
_VECTORS = {  # ours, within a block: theirs, within a layer
    "norm1_scale": "norm1.weight",
    "norm1_bias": "norm1.bias",
    "norm2_scale": "norm2.weight",
    "norm2_bias": "norm2.bias",
    "up_bias": "ff.0.bias",
    "down_bias": "ff.3.bias",
}


def config_from_torch(
    state_dict: Mapping[str, Any], *, num_iterations: int, **fields: Any
) -> ModelConfig:
    """The architecture of published weights, read off their shapes.

    Args:
      state_dict: name to array (anything `numpy.asarray` takes).
      num_iterations: T, which the file does not tell.
      **fields: other fields of `ModelConfig`, such as `param_dtype`.

    Raises:
      InputError: a weight that tells a size is missing or has another rank.
    """
    vocab_size, d_model = _matrix_shape(state_dict, EMBEDDING)
    pattern = re.compile(r"layers\.(\d+)\.")
    layers = {int(m.group(1)) for name in state_dict if (m := pattern.match(str(name)))}
    defaults = {"kappa": float("inf")}
    if POSITIONS in state_dict:
        defaults["max_seq_len"] = _positions(state_dict, d_model).shape[0]
    return ModelConfig(
        **{
            "vocab_size": vocab_size,
            "d_model": d_model,
            "num_layers": len(layers),
            "num_iterations": num_iterations,
            "d_ff": _matrix_shape(state_dict, "layers.0.ff.0.weight")[0],
            "controller_width": _matrix_shape(state_dict, "layers.0.inl.mlp_alpha.0.weight")[0],
            "context": "mean",
        }
        | defaults
        | fields
    )


def params_from_torch(
    state_dict: Mapping[str, Any],
    model_config: ModelConfig,
    *,
    asarray: Callable[..., Any] = jnp.asarray,
) -> Any:
    """Our parameters from published weights, in `model_config.param_dtype`.

    The published harmonic stands still in evaluation, at `phi + gamma * global_step`: that becomes
    phi, and gamma 0.

    Args:
      state_dict: name to array (anything `numpy.asarray` takes).
      model_config: see `config_from_torch`.
      asarray: makes each parameter; `numpy.asarray` leaves them on the host.

    Raises:
      InputError: a weight is missing, left over, of the wrong shape or type or not finite, or the
        model is not of the published kind.
    """
    c = model_config
    if c.context != "mean":
        raise InputError(f"model.context={c.context}: published weights are of the mean context")
    weights = _checked(state_dict, c)
    root_d = c.d_model**0.5

    def block(i: int) -> dict[str, Any]:
        def layer(name: str) -> np.ndarray:
            return weights[f"layers.{i}.{name}"]

        inputs = [layer(f"inl.mlp_{n}.0.weight").T for n in _NETWORKS.values()]
        hidden_kernel = np.stack(inputs, axis=1)  # [3D, Q, C], rows in the order h, x, v
        gamma = layer("inl.excitation_gamma")
        integrator = {
            "mu": layer("inl.mu"),
            "gamma": np.zeros_like(gamma),
            "phi": layer("inl.excitation_phi") + gamma * layer(_COUNTER),
            "context_kernel": hidden_kernel[: c.d_model],
            "state_kernel": hidden_kernel[c.d_model :].reshape(2, -1, *hidden_kernel.shape[1:]),
            "hidden_bias": np.stack([layer(f"inl.mlp_{n}.0.bias") for n in _NETWORKS.values()]),
            "output_kernel": np.stack(
                [layer(f"inl.mlp_{n}.2.weight").T for n in _NETWORKS.values()]
            ),
            "output_bias": np.stack([layer(f"inl.mlp_{n}.2.bias") for n in _NETWORKS.values()]),
        }
        return {ours: layer(theirs) for ours, theirs in _VECTORS.items()} | {
            "up_kernel": layer("ff.0.weight").T,
            "down_kernel": layer("ff.3.weight").T,
            "context": {
                "kernel": layer("context_projection.weight").T,
                "bias": layer("context_projection.bias"),
            },
            "integrator": integrator,
        }

    blocks = [block(i) for i in range(c.num_layers)]
    params = {
        "embedding": weights[EMBEDDING] / root_d,
        "blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *blocks),
        "final_norm_scale": weights["final_norm.weight"] * root_d,
        "final_norm_bias": weights["final_norm.bias"] * root_d,
    }
    return jax.tree.map(
        lambda found, wanted: asarray(found, wanted.dtype), params, abstract_params(c)
    )


def params_to_torch(params: Any, model_config: ModelConfig) -> dict[str, np.ndarray]:
    """Published names and layouts from our parameters: the inverse of `params_from_torch`.

    The published model computes the same function with them, in evaluation. It takes the number of
    iterations and the dropout from elsewhere: `config_from_torch` must be given them.

    Returns:
      name to array, as `torch.from_numpy` takes it: NumPy has no bfloat16, so that becomes float32.

    Raises:
      InputError: the published model cannot compute this function; what it lacks is named.
    """
    c = model_config
    for field, value, published in (
        ("attention_every", c.attention_every, 0),
        ("context", c.context, "mean"),
        ("kappa", c.kappa, math.inf),
        ("dt", c.dt, 0.1),
        ("tol", c.tol, 0.0),
        ("excitation_amplitude", c.excitation_amplitude, 0.03),
    ):
        require(
            value == published,
            f"model.{field}={value}: in the published model it is {published}; {_INSTEAD}",
        )
    gamma = np.asarray(params["blocks"]["integrator"]["gamma"], np.float32)
    require(
        not gamma.any(),
        f"integrator.gamma is up to {np.abs(gamma).max():.3g}: the published harmonic stands still "
        f"in evaluation, as with gamma 0; {_INSTEAD}",
    )
    return published_layout(params, c)


def published_layout(params: Any, model_config: ModelConfig) -> dict[str, np.ndarray]:
    """As `params_to_torch`, of any model of the mean context, whatever it computes.

    Args:
      params: the parameters, or a tree of the same structure, such as their gradients.
      model_config: their architecture.
    """
    c = model_config
    params = jax.tree.map(
        lambda leaf: np.asarray(leaf, np.float32 if leaf.dtype == jnp.bfloat16 else None), params
    )
    root_d = np.asarray(c.d_model**0.5, params["embedding"].dtype)
    embedding = params["embedding"] * root_d
    out = {
        EMBEDDING: embedding,
        HEAD: embedding,
        "final_norm.weight": params["final_norm_scale"] / root_d,
        "final_norm.bias": params["final_norm_bias"] / root_d,
        POSITIONS: np.array(sinusoid(jnp.arange(c.max_seq_len)[None], c.d_model, embedding.dtype)),
    }
    for i in range(c.num_layers):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
        integrator = block["integrator"]
        hidden = np.concatenate([integrator["context_kernel"], *integrator["state_kernel"]])
        layer = {theirs: block[ours] for ours, theirs in _VECTORS.items()} | {
            "ff.0.weight": block["up_kernel"].T,
            "ff.3.weight": block["down_kernel"].T,
            "context_projection.weight": block["context"]["kernel"].T,
            "context_projection.bias": block["context"]["bias"],
            "inl.mu": integrator["mu"],
            "inl.excitation_gamma": integrator["gamma"],
            "inl.excitation_phi": integrator["phi"],
            _COUNTER: np.zeros((), np.int64),
        }
        for q, name in enumerate(_NETWORKS.values()):
            layer |= {
                f"inl.mlp_{name}.0.weight": hidden[:, q].T,
                f"inl.mlp_{name}.0.bias": integrator["hidden_bias"][q],
                f"inl.mlp_{name}.2.weight": integrator["output_kernel"][q].T,
                f"inl.mlp_{name}.2.bias": integrator["output_bias"][q],
            }
        out |= {f"layers.{i}.{name}": np.array(v, order="C") for name, v in layer.items()}
    return out


def _shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the published weights, without the tied head and the positions."""
    d, f, q = c.d_model, c.d_ff, c.controller_width
    layer = {
        "norm1.weight": (d,),
        "norm1.bias": (d,),
        "norm2.weight": (d,),
        "norm2.bias": (d,),
        "context_projection.weight": (d, d),
        "context_projection.bias": (d,),
        "ff.0.weight": (f, d),
        "ff.0.bias": (f,),
        "ff.3.weight": (d, f),
        "ff.3.bias": (d,),
        "inl.mu": (d,),
        "inl.excitation_gamma": (d,),
        "inl.excitation_phi": (d,),
        _COUNTER: (),
    }
    for name in _NETWORKS.values():
        layer |= {
            f"inl.mlp_{name}.0.weight": (q, 3 * d),
            f"inl.mlp_{name}.0.bias": (q,),
            f"inl.mlp_{name}.2.weight": (d, q),
            f"inl.mlp_{name}.2.bias": (d,),
        }
    shapes = {EMBEDDING: (c.vocab_size, d), "final_norm.weight": (d,), "final_norm.bias": (d,)}
    for i in range(c.num_layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def _checked(state_dict: Mapping[str, Any], c: ModelConfig) -> dict[str, np.ndarray]:
    """The weights by name, once all are there, none is left over and each is as it must be."""
    shapes = _shapes(c)
    left_over = [repr(name) for name in state_dict if name not in {*shapes, HEAD, POSITIONS}]
    if left_over:
        raise InputError(
            f"weights the config has no place for: {', '.join(left_over[:5])} "
            f"({len(left_over)} in all); check model.num_layers={c.num_layers}"
        )
    weights = {name: _weight(state_dict, name) for name in shapes}
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            raise InputError(
                f"{name} has shape {weights[name].shape}, the config wants {shape}: read the sizes "
                "with config_from_torch"
            )
    if HEAD in state_dict and not np.array_equal(_weight(state_dict, HEAD), weights[EMBEDDING]):
        raise InputError(f"{HEAD} differs from {EMBEDDING}: they must be tied")
    if POSITIONS in state_dict:
        table = _positions(state_dict, c.d_model)
        ours = sinusoid(jnp.arange(len(table))[None], c.d_model, jnp.float32)[0]
        error = float(np.abs(table - np.asarray(ours)).max())
        if error > 2e-3:  # float32 angles at position 4096 are good to about 2e-4
            raise InputError(f"{POSITIONS} differs from the sinusoid by {error:.1e}")
    return weights


def _weight(state_dict: Mapping[str, Any], name: str) -> np.ndarray:
    if name not in state_dict:
        raise InputError(f"published weights lack {name}: is this an INL-LLM state_dict?")
    try:
        weight = np.asarray(state_dict[name])
    except Exception as error:  # of whatever made the weights
        raise InputError(
            f"{name} is no array for NumPy ({first_line(error)}): pass it as float32 on the CPU"
        ) from error
    if weight.dtype.kind != ("i" if name.endswith(_COUNTER) else "f"):
        raise InputError(
            f"{name} is of type {weight.dtype}: weights must be floating-point numbers"
        )
    if not np.isfinite(weight).all():
        raise InputError(f"{name} holds NaN or infinity: take weights from before they diverged")
    return weight


def _matrix_shape(state_dict: Mapping[str, Any], name: str) -> tuple[int, int]:
    shape = _weight(state_dict, name).shape
    if len(shape) != 2:
        raise InputError(f"{name} has shape {shape}: it must be a matrix")
    return shape


def _positions(state_dict: Mapping[str, Any], d_model: int) -> np.ndarray:
    """The table of positions, [positions, D]."""
    table = _weight(state_dict, POSITIONS)
    if table.ndim == 3 and len(table) == 1:
        table = table[0]
    if table.ndim != 2 or table.shape[1] != d_model or not len(table):
        raise InputError(f"{POSITIONS} has shape {table.shape}: it must be [positions, {d_model}]")
    return table
