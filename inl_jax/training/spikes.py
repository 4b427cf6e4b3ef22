"""Spikes: updates whose gradient norm is far above those before. Part of the jitted step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

WINDOW = 128  # accepted norms whose median counts
LEAST = 16  # accepted norms before any is a spike
IN_A_ROW = 8  # spikes in a row; after them the level has changed


class Window(NamedTuple):
    """The norms of the last accepted updates; a part of the optimizer state."""

    norms: jax.Array  # float32 [WINDOW], a ring
    accepted: jax.Array  # how many were put into it, int32
    in_a_row: jax.Array  # spikes since the last accepted update, int32


def init_window() -> Window:
    """A window without norms."""
    return Window(jnp.zeros(WINDOW), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def judge(
    window: Window, norm: jax.Array, *, finite: jax.Array, multiple: float
) -> tuple[Window, jax.Array, jax.Array]:
    """Whether an update is a spike: its norm exceeds `multiple` times the median of the window.

    A spike does not enter the window, nor does an update that is not finite. After `IN_A_ROW`
    spikes in a row the window starts anew: a lasting change of level is not skipped for ever.

    Args:
      window: of the updates before.
      norm: gradient norm of this update, a scalar.
      finite: whether its loss and norm are finite.
      multiple: `optim.skip_spikes`.

    Returns:
      (window, whether this is a spike, the median; NaN if the window is empty).
    """
    norm = norm.astype(jnp.float32)
    held = jnp.where(jnp.arange(WINDOW) < window.accepted, window.norms, jnp.nan)
    median = jnp.nanmedian(held)
    high = finite & (window.accepted >= LEAST) & (norm > multiple * median)
    anew = high & (window.in_a_row >= IN_A_ROW)
    spike = high & ~anew
    accepted = jnp.where(anew, 0, window.accepted)
    entered = Window(window.norms.at[accepted % WINDOW].set(norm), accepted + 1, 0)
    seen = window._replace(in_a_row=window.in_a_row + spike)
    return (
        jax.tree.map(lambda a, b: jnp.where(finite & ~spike, a, b), entered, seen),
        spike,
        median,
    )
