import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inl_jax.model.mixers import kv_cache
from inl_jax.model.mixers.attention import attend
from inl_jax.model.mixers.kv_cache import attend_with_cache, write_entries
from inl_jax.model.mixers.span import LayerState, TokenSpan

B, S, H, G, K, N = 3, 2, 4, 2, 8, 13
STARTS = np.array([0, 4, 7])  # where the rows' new tokens begin


@pytest.fixture(params=[1, 4, 13])
def width(request, monkeypatch):
    """Entries of a block; 4 does not divide the 13 of the cache."""
    monkeypatch.setattr(kv_cache, "block_width", lambda num_entries, num_tokens: request.param)
    return request.param


@pytest.fixture
def sequences():
    """Queries, keys and values of whole rows, [B, N, heads, K] each."""
    draw = np.random.default_rng(0).normal
    return draw(size=(B, N, H, K)), draw(size=(B, N, G, K)), draw(size=(B, N, G, K))


def cached(sequences, beyond):
    """Attention of the new tokens; entries of the cache from `beyond` on are not numbers."""
    query, key, value = (jnp.asarray(a, jnp.float32) for a in sequences)
    tokens = TokenSpan(jnp.asarray(STARTS)[:, None] + jnp.arange(S), None)
    new = {"key": key, "value": value}
    new = {
        n: jnp.stack([a[b, at] for b, at in enumerate(tokens.position_BS)]) for n, a in new.items()
    }
    layers = {"key": key, "value": value}
    layers = {n: a.swapaxes(1, 2).at[:, :, beyond:].set(jnp.nan) for n, a in layers.items()}
    layers = {n: jnp.stack([jnp.full_like(a, jnp.nan), a]) for n, a in layers.items()}
    q = jnp.stack([query[b, at] for b, at in enumerate(tokens.position_BS)])
    new = {n: a.swapaxes(1, 2) for n, a in new.items()}
    return attend_with_cache(q, new, LayerState(layers, jnp.int32(1)), tokens)


def test_attend_with_cache_is_attention_over_the_whole_rows(sequences, width):
    """For rows of different lengths, whatever is in the entries that they have not reached."""
    whole = attend(*(jnp.asarray(a, jnp.float32) for a in sequences))
    found = cached(sequences, N)
    for b, start in enumerate(STARTS):
        np.testing.assert_allclose(found[b], whole[b, start : start + S], rtol=1e-4, atol=1e-5)


def test_attend_with_cache_reads_no_block_beyond_the_longest_row(sequences, width):
    """Not even with weight 0: its entries are not numbers, and the context is."""
    beyond = min(N, -(-STARTS.max() // width) * width)
    np.testing.assert_array_equal(cached(sequences, beyond), cached(sequences, N))


def test_write_entries_writes_at_each_rows_position_and_nowhere_else():
    caches = {"key": jnp.zeros((2, B, G, N, K))}
    new = jnp.asarray(np.random.default_rng(0).normal(size=(2, B, G, S, K)), jnp.float32)
    starts = np.array([0, 5, N - 1])  # the last token of the last row has no room
    written = jax.jit(write_entries)(caches, {"key": new}, starts[:, None] + np.arange(S))["key"]
    expected = np.zeros(written.shape, np.float32)
    for b, start in enumerate(starts):
        expected[:, b, :, start : start + S] = new[:, b, :, : N - start]
    np.testing.assert_array_equal(written, expected)
