"""The key-value cache of attention: read up to the rows' positions, written in place.

A decoding step reads a cache of many gigabytes and writes one entry of each row. So the layers only
read the cache, block by block as far as the longest row reaches, and hand on their new entries,
which are written together after the last layer. No program copies a cache, and the cost of a token
follows its position and not the room allocated.

Shapes: L layers, B batch, S tokens given, G key-value heads, R query heads of each, K head width,
N entries of the cache, n entries read at once.
"""

import jax
import jax.numpy as jnp

from inl_jax.model.layers import at_least_float32
from inl_jax.model.mixers.span import LayerState, TokenSpan
from inl_jax.model.platform.device import current_device


def attend_with_cache(q_BSHK, new_BGSK, state: LayerState, tokens: TokenSpan) -> jax.Array:
    """Softmax attention over a layer's cache and causally over the new tokens, [B, S, H, K].

    The softmax over all of them is accumulated block by block: numerator, denominator and the
    largest score so far (Milakov and Gimelshein, 2018).

    Args:
      q_BSHK: queries of the new tokens.
      new_BGSK: "key" and "value" of the new tokens.
      state: the caches, [L, B, G, N, K] each. Row b sees its entries before its first new token.
      tokens: positions of the new tokens.
    """
    B, S, H, K = q_BSHK.shape
    G, N = state.layers["key"].shape[2:4]
    q_BGRSK = q_BSHK.reshape(B, S, G, H // G, K).transpose(0, 2, 3, 1, 4)
    start_B = tokens.position_BS[:, 0]
    width = block_width(N, S)
    dtype = at_least_float32(q_BSHK)

    def add(total, key_BGnK, value_BGnK, seen):
        largest, denominator, numerator = total
        # The key first: with the query first, XLA lays out the whole cache anew on GPUs.
        score = jnp.einsum(
            "bgnk,bgrsk->bgnrs", key_BGnK, q_BGRSK, preferred_element_type=dtype
        ).transpose(0, 1, 3, 4, 2)
        score = jnp.where(seen, score * K**-0.5, -jnp.inf)
        new_largest = jnp.maximum(largest, score.max(axis=-1, keepdims=True))
        kept, weight = jnp.exp(largest - new_largest), jnp.exp(score - new_largest)
        value = jnp.einsum(
            "bgrsn,bgnk->bgrsk",
            weight.astype(value_BGnK.dtype),
            value_BGnK,
            preferred_element_type=dtype,
        )
        denominator = kept * denominator + weight.sum(axis=-1, keepdims=True)
        return new_largest, denominator, kept * numerator + value

    def add_block(i, total):
        # The last block may begin within the one before, whose entries then count only there.
        first = jnp.minimum(i * width, N - width)
        entry_n = first + jnp.arange(width)
        seen_Bn = (entry_n >= i * width) & (entry_n < start_B[:, None])
        key, value = (
            jax.lax.dynamic_slice(
                state.layers[name], (state.index, 0, 0, first, 0), (1, B, G, width, K)
            )[0]
            for name in ("key", "value")
        )
        return add(total, key, value, seen_Bn[:, None, None, None])

    total = (
        jnp.full((B, G, H // G, S, 1), -jnp.inf, dtype),
        jnp.zeros((B, G, H // G, S, 1), dtype),
        jnp.zeros((B, G, H // G, S, K), dtype),
    )
    # First the new tokens: each sees itself, so that its largest score is finite from here on.
    total = add(total, new_BGSK["key"], new_BGSK["value"], jnp.tri(S, dtype=bool))
    num_blocks = -(-jnp.max(start_B) // width)
    _, denominator, numerator = jax.lax.fori_loop(0, num_blocks, add_block, total)
    out_BGRSK = (numerator / denominator).astype(q_BSHK.dtype)
    return out_BGRSK.transpose(0, 3, 1, 2, 4).reshape(B, S, H, K)


def block_width(num_entries: int, num_tokens: int) -> int:
    """Entries of the cache that are read at once for `num_tokens` new tokens of each row.

    A block of 64 stays in the caches of a CPU: wider ones take longer (docs/LOG.md). A GPU waits
    for the host at every block, so its blocks are wider; their width is not measured. The more
    queries, the wider the blocks, so that fewer sums are rescaled.
    """
    narrowest = 64 if current_device().platform == "cpu" else 1024
    return min(num_entries, max(narrowest, num_tokens))


def write_entries(caches, new, position_BS) -> dict[str, jax.Array]:
    """The caches of all layers with the entries of the new tokens.

    Padding is written too: no row sees it, and the row's later tokens overwrite it. Entries beyond
    the end of the cache are dropped.

    Args:
      caches: "key" and "value", [L, B, G, N, K] each.
      new: the same names, [L, B, G, S, K] each.
      position_BS: of the new tokens.
    """
    row_B1 = jnp.arange(position_BS.shape[0])[:, None]
    return {
        name: cache.at[:, row_B1, :, position_BS].set(
            # The two indices of different axes come first.
            new[name].transpose(1, 3, 0, 2, 4).astype(cache.dtype),
            mode="drop",
            indices_are_sorted=True,
            unique_indices=True,
        )
        for name, cache in caches.items()
    }
