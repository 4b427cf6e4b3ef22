"""Published PyTorch weights in and out.

The published model is the mean context. Linear weights there are [out, in]; its logits come from
an unscaled embedding, so the square root of D moves between the embedding and the final norm.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from inl_jax.config import InputError, ModelConfig
from inl_jax.model.dynamics import CONTROLLERS
from inl_jax.model.language_model import abstract_params
from inl_jax.model.layers import sinusoid

_NETWORKS = dict(zip(CONTROLLERS, ("alpha", "beta", "gate", "v_cand"), strict=True))
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
      InputError: a weight the published model has is missing.
    """
    vocab_size, d_model = _get(state_dict, "token_embedding.weight").shape
    pattern = re.compile(r"layers\.(\d+)\.")
    layers = {int(m.group(1)) for name in state_dict if (m := pattern.match(name))}
    defaults = {"kappa": float("inf")}
    if "pos_encoding.pe" in state_dict:
        defaults["max_seq_len"] = np.asarray(state_dict["pos_encoding.pe"]).shape[-2]
    return ModelConfig(
        **{
            "vocab_size": vocab_size,
            "d_model": d_model,
            "num_layers": len(layers),
            "num_iterations": num_iterations,
            "d_ff": _get(state_dict, "layers.0.ff.0.weight").shape[0],
            "controller_width": _get(state_dict, "layers.0.inl.mlp_alpha.0.weight").shape[0],
            "context": "mean",
        }
        | defaults
        | fields
    )


def params_from_torch(state_dict: Mapping[str, Any], model_config: ModelConfig) -> Any:
    """Our parameters from published weights, in `model_config.param_dtype`.

    The published harmonic stands still in evaluation, at `phi + gamma * global_step`: that becomes
    phi, and gamma 0.

    Args:
      state_dict: name to array (anything `numpy.asarray` takes).
      model_config: see `config_from_torch`.

    Raises:
      InputError: a weight is missing, left over or of the wrong shape, or the model is not of the
        published kind.
    """
    c = model_config
    if c.context != "mean":
        raise InputError(f"model.context={c.context}: published weights are of the mean context")
    root_d = c.d_model**0.5
    used = set()

    def get(name: str) -> np.ndarray:
        used.add(name)
        return _get(state_dict, name)

    def block(i: int) -> dict[str, Any]:
        def layer(name: str) -> np.ndarray:
            return get(f"layers.{i}.{name}")

        inputs = [layer(f"inl.mlp_{n}.0.weight").T for n in _NETWORKS.values()]
        hidden_kernel = np.stack(inputs, axis=1)  # [3D, Q, C], rows in the order h, x, v
        gamma = layer("inl.excitation_gamma")
        integrator = {
            "mu": layer("inl.mu"),
            "gamma": np.zeros_like(gamma),
            "phi": layer("inl.excitation_phi") + gamma * layer("inl.global_step"),
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

    embedding = get("token_embedding.weight")
    blocks = [block(i) for i in range(c.num_layers)]
    params = {
        "embedding": embedding / root_d,
        "blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *blocks),
        "final_norm_scale": get("final_norm.weight") * root_d,
        "final_norm_bias": get("final_norm.bias") * root_d,
    }
    if "lm_head.weight" in state_dict and not np.array_equal(get("lm_head.weight"), embedding):
        raise InputError("lm_head.weight differs from token_embedding.weight: they must be tied")
    if "pos_encoding.pe" in state_dict:
        _check_positions(get("pos_encoding.pe"))
    left_over = sorted(set(state_dict) - used)
    if left_over:
        raise InputError(
            f"weights the config has no place for: {', '.join(left_over[:5])} "
            f"({len(left_over)} in all); check model.num_layers={c.num_layers}"
        )

    def fit(path, found, wanted):
        if found.shape != wanted.shape:
            name = "/".join(str(k.key) for k in path)
            raise InputError(
                f"{name} has shape {found.shape}, the config wants {wanted.shape}: "
                "read the sizes with config_from_torch"
            )
        return jnp.asarray(found, wanted.dtype)

    return jax.tree_util.tree_map_with_path(fit, params, abstract_params(c))


def params_to_torch(params: Any, model_config: ModelConfig) -> dict[str, np.ndarray]:
    """Published names and layouts from our parameters: the inverse of `params_from_torch`.

    The published model has no iteration-dependent harmonic in evaluation and no dynamic alpha, so
    only a model whose gamma is 0 (as imported ones) computes the same function there; for others
    the weights are exact and the excitation differs.

    Raises:
      InputError: the model is not of the mean context.
    """
    c = model_config
    if c.context != "mean":
        raise InputError(f"model.context={c.context}: the published model is the mean context")
    params = jax.tree.map(np.asarray, params)
    root_d = np.asarray(c.d_model**0.5, params["embedding"].dtype)
    embedding = params["embedding"] * root_d
    out = {
        "token_embedding.weight": embedding,
        "lm_head.weight": embedding,
        "final_norm.weight": params["final_norm_scale"] / root_d,
        "final_norm.bias": params["final_norm_bias"] / root_d,
        "pos_encoding.pe": np.asarray(
            sinusoid(jnp.arange(c.max_seq_len)[None], c.d_model, embedding.dtype)
        ),
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
            "inl.global_step": np.zeros((), np.int64),
        }
        for q, name in enumerate(_NETWORKS.values()):
            layer |= {
                f"inl.mlp_{name}.0.weight": hidden[:, q].T,
                f"inl.mlp_{name}.0.bias": integrator["hidden_bias"][q],
                f"inl.mlp_{name}.2.weight": integrator["output_kernel"][q].T,
                f"inl.mlp_{name}.2.bias": integrator["output_bias"][q],
            }
        out |= {f"layers.{i}.{name}": np.ascontiguousarray(v) for name, v in layer.items()}
    return out


def _get(state_dict: Mapping[str, Any], name: str) -> np.ndarray:
    if name not in state_dict:
        raise InputError(f"published weights lack {name}: is this an INL-LLM state_dict?")
    return np.asarray(state_dict[name])


def _check_positions(table: np.ndarray) -> None:
    table = table.reshape(-1, table.shape[-1])
    ours = sinusoid(jnp.arange(len(table))[None], table.shape[-1], jnp.float32)[0]
    error = float(np.abs(table - np.asarray(ours)).max())
    if error > 2e-3:  # float32 angles at position 4096 are good to about 2e-4
        raise InputError(f"pos_encoding.pe differs from the sinusoid by {error:.1e}")
