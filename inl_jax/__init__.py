"""INL-LLM in JAX: the names to use; `README.md` tells the rest."""

from inl_jax.config import InputError, ModelConfig, TrainConfig
from inl_jax.config_file import load_config
from inl_jax.guide import train_inl_llm
from inl_jax.interop import published as interop
from inl_jax.model.language_model import apply, init_params, param_count
from inl_jax.sampling import LanguageModel, generate
from inl_jax.trainer import TrainResult, train

__all__ = [
    "InputError",
    "LanguageModel",
    "ModelConfig",
    "TrainConfig",
    "TrainResult",
    "apply",
    "generate",
    "init_params",
    "interop",
    "load_config",
    "param_count",
    "train",
    "train_inl_llm",
]
