"""Weights of other programs, in and out."""

from inl_jax.interop.exporter import export
from inl_jax.interop.published import config_from_torch, params_from_torch, params_to_torch

__all__ = ["config_from_torch", "export", "params_from_torch", "params_to_torch"]
