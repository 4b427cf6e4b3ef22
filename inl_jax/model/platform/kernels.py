"""The kernels that a model asks for, on a device that may lack them."""

import dataclasses

from inl_jax.config import InputError, ModelConfig
from inl_jax.console import say
from inl_jax.model.mixers.attention import attention_kernel
from inl_jax.model.mosaic.run_mosaic import integrator_kernel


def check_kernels(config: ModelConfig) -> None:
    """Raises `InputError` if the current device or mesh lacks a kernel that a training asks for."""
    for kernel in _kernels(config).values():
        kernel(config)


def with_kernels_found_here(config: ModelConfig) -> ModelConfig:
    """`config` of a trained model, with xla for kernels that are missing here, for its weights.

    Says so in a line for each. xla gives the same numbers, but for rounding. Training refuses what
    is missing (`check_kernels`), since xla needs more time and memory there.
    """
    found = config
    for field, kernel in _kernels(config).items():
        try:
            kernel(config)
        except InputError:
            asked = getattr(config, field)
            say(
                f"model.{field}={asked}: not for this model on this device; xla computes the same, "
                "but for rounding"
            )
            found = dataclasses.replace(found, **{field: "xla"})
    return found


def _kernels(config: ModelConfig) -> dict:
    """The fields of the kernels that `config` uses, with the functions that check them."""
    attention = {"attention_kernel": attention_kernel} if config.uses_attention else {}
    return attention | {"integrator_kernel": integrator_kernel}
