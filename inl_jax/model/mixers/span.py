"""Where the tokens given to a block stand in their sequences."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class TokenSpan(NamedTuple):
    """Where the tokens given to a block stand in their sequences."""

    position_BS: jax.Array  # of every token in its sequence, int32
    length_B: jax.Array | None  # number of real tokens; the rest is padding on the right


def last_real(h_BSD, tokens: TokenSpan) -> jax.Array:
    """The vector at the last real token of each row, [B, D]."""
    if tokens.length_B is None:
        return h_BSD[:, -1]
    return jnp.take_along_axis(h_BSD, (tokens.length_B - 1)[:, None, None], axis=1)[:, 0]
