"""The architecture as the config.json of an exported model, and back.

Its fields keep our names; `InlConfig` there adds those that transformers reads. JSON has no
infinity, so `kappa` is null if alpha does not fall.
"""

import math
from collections.abc import Mapping
from typing import Any

from inl_jax.checks import InputError, require
from inl_jax.config import ModelConfig

MODEL_TYPE = "inl"
# Fields that decide what a trained model computes.
FUNCTION = """vocab_size d_model num_layers num_iterations d_ff max_seq_len controller_width context
attention_every num_heads num_kv_heads dt excitation_amplitude kappa dropout""".split()
# Fields that say how it is computed here, or how it began; transformers chooses anew.
COMPUTATION = """initial_beta compute_dtype attention_kernel remat integrator_gradient
integrator_segment integrator_kernel integrator_chunk trajectory_dtype unroll""".split()
# Fields that decide what is computed and are not in config.json; they must have their defaults.
REFUSED = ["tol"]


def to_json_fields(config: ModelConfig) -> dict[str, Any]:
    """The fields of `config` in config.json.

    Raises:
      InputError: `tol` is not 0.
    """
    require(
        config.tol == 0,
        f"model.tol={config.tol}: an exported model takes all iterations; set model.tol=0",
    )
    fields = {name: getattr(config, name) for name in FUNCTION}
    return fields | {"kappa": None if math.isinf(config.kappa) else config.kappa}


def from_json_fields(found: Mapping[str, Any], *, param_dtype: str, of: str) -> ModelConfig:
    """The architecture that a config.json describes.

    Args:
      found: its content.
      param_dtype: the type of the weights beside it.
      of: what messages call it.

    Raises:
      InputError: it is not of such a model, or a field is missing or impossible.
    """
    kind = found.get("model_type")
    require(kind == MODEL_TYPE, f"{of}: model_type is {kind!r}, not {MODEL_TYPE!r}; export a model")
    found = {"attention_every": 0} | dict(found)  # exports of earlier versions lack it
    missing = [name for name in FUNCTION if name not in found]
    require(not missing, f"{of}: lacks {', '.join(missing)}; export the model again")
    fields = {name: found[name] for name in FUNCTION}
    if fields["kappa"] is None:
        fields["kappa"] = math.inf
    try:
        return ModelConfig(**fields, param_dtype=param_dtype)
    except InputError as error:
        raise InputError(f"{of}: {error}") from None
