"""What a mixer is told: where its tokens stand in their sequences, and the state before them."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


class TokenSpan(NamedTuple):
    """Where the tokens given to a block stand in their sequences."""

    position_BS: jax.Array  # of every token in its sequence, int32
    length_B: jax.Array | None  # number of real tokens; the rest is padding on the right


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerState:
    """What decoding keeps of the earlier tokens, as a layer reads it: `state["h"]` is its part.

    A cache is too large to be cut out of the whole: attention reads it there, block by block.
    """

    layers: dict[str, jax.Array]  # of all layers, every leaf [L, B, ...]
    index: jax.Array  # of this layer

    def __getitem__(self, name: str) -> jax.Array:
        return self.layers[name][self.index]

    def part(self, name: str) -> "LayerState":
        """The state of one of the layers that are scanned together."""
        return LayerState(self.layers[name], self.index)


def last_real(h_BSD, tokens: TokenSpan) -> jax.Array:
    """The vector at the last real token of each row, [B, D]."""
    if tokens.length_B is None:
        return h_BSD[:, -1]
    return jnp.take_along_axis(h_BSD, (tokens.length_B - 1)[:, None, None], axis=1)[:, 0]
