"""INL-LLM in JAX: the public names.

`import inl_jax` alone loads no JAX; a name loads its module on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inl_jax import interop
    from inl_jax.config import InputError, ModelConfig, TrainConfig
    from inl_jax.config_file import load_config
    from inl_jax.guide import train_inl_llm
    from inl_jax.model.language_model import apply, init_params, param_count
    from inl_jax.result import TrainResult
    from inl_jax.sampling import LanguageModel, generate
    from inl_jax.trainer import train

__version__ = "0.1.0"

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

_MODULES = {
    "InputError": "config",
    "LanguageModel": "sampling",
    "ModelConfig": "config",
    "TrainConfig": "config",
    "TrainResult": "result",
    "apply": "model.language_model",
    "generate": "sampling",
    "init_params": "model.language_model",
    "load_config": "config_file",
    "param_count": "model.language_model",
    "train": "trainer",
    "train_inl_llm": "guide",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'inl_jax' has no attribute {name!r}")
    from inl_jax.guest import own_logging, own_random

    with own_logging(), own_random():
        if name == "interop":
            return importlib.import_module("inl_jax.interop")
        value = getattr(importlib.import_module(f"inl_jax.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
