"""Orbax's new API, imported without the logging set-up that its import brings."""

from inl_jax.guest import own_logging

with own_logging():
    from orbax.checkpoint import v1 as ocp

__all__ = ["ocp"]
