"""The device that a model is made for, which decides every `auto` of its config.

It is the one JAX runs on, or one named in its place: XLA compiles for GPUs on a machine without.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import jax


class Device(NamedTuple):
    """A kind of device."""

    platform: str  # "cpu", "gpu" or "tpu", as JAX calls it
    capability: tuple[int, ...] | None = None  # CUDA compute capability; None on other devices

    def __str__(self) -> str:
        """`cpu`, or `gpu 9.0`."""
        return f"{self.platform} {'.'.join(map(str, self.capability or ()))}".rstrip()


H100 = Device("gpu", (9, 0))

_named: contextvars.ContextVar[Device | None] = contextvars.ContextVar("device", default=None)


def current_device() -> Device:
    """The device of the innermost `made_for`; by default the first that JAX runs on."""
    if named := _named.get():
        return named
    device = jax.local_devices()[0]
    if "cuda" not in device.client.platform_version:
        return Device(jax.default_backend())
    return Device("gpu", tuple(map(int, device.compute_capability.split("."))))


@contextlib.contextmanager
def made_for(device: Device | None) -> Iterator[None]:
    """What is traced inside is made for `device`; None changes nothing."""
    token = _named.set(device or _named.get())
    try:
        yield
    finally:
        _named.reset(token)
