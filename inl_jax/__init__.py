"""INL-LLM in JAX: the names to use; `README.md` tells the rest."""

from inl_jax import interop
from inl_jax.config import InputError, ModelConfig, TrainConfig
from inl_jax.config import load as load_config
from inl_jax.generate import LanguageModel, generate
from inl_jax.model import apply, init_params, param_count
from inl_jax.train import TrainResult, train, train_inl_llm

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
