"""Ids to ids: prompts are read in pieces, then compiled loops of single tokens continue them.

Shapes: B rows, P tokens of a prompt, n tokens of a piece, V vocabulary.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from inl_jax.config import InputError, ModelConfig
from inl_jax.console import plural, say
from inl_jax.model.language_model import DecodeState, decode, init_decode_state, join_states
from inl_jax.parallel.processes import call_together
from inl_jax.parallel.sharding import fetch, on
from inl_jax.sampling.choice import Sampling, choose, penalize

PROMPT_PIECE = 512
"""Tokens of each prompt that are read at once: memory does not grow with the prompts."""
SHORTEST_PIECE = 32
MOST_ROWS = 2**16


class Rows(NamedTuple):
    """Rows that are being continued."""

    logits_BV: jax.Array  # after the last token
    state: DecodeState
    keys_B: jax.Array
    seen_BV: jax.Array | None  # which tokens are in the row; None without a repetition penalty
    done_B: jax.Array  # which rows have met their end token


class Piece(NamedTuple):
    """New tokens of all rows, on the host."""

    tokens_Bn: np.ndarray
    log_probs_Bn: np.ndarray  # of each token, given all before it, by the model itself
    length_B: np.ndarray  # how many of them count; the end token does not
    done_B: np.ndarray  # which rows have met their end token


# --- reading


@functools.partial(jax.jit, static_argnames=("config", "max_len"))
def read_first(config: ModelConfig, params, ids_BP, length_B, *, max_len: int):
    """Logits after each prompt [B, V], and the decoding state; as `prefill`, in one piece."""
    state = init_decode_state(config, ids_BP.shape[0], max_len)
    return decode(config, params, state, ids_BP, length_B)


@functools.partial(jax.jit, static_argnames=("config",), donate_argnums=(2, 3))
def read_on(config: ModelConfig, params, logits_BV, state: DecodeState, ids_BP, length_B):
    """Reads more tokens into a state, which it takes over; rows of length 0 stay as they are."""
    read = decode(config, params, state, ids_BP, jnp.maximum(length_B, 1))

    def keep(axis, old, new):
        some = length_B.reshape([-1 if i == axis else 1 for i in range(new.ndim)]) > 0
        return jnp.where(some, new, old)

    logits_BV, position_B = (
        keep(0, old, new)
        for old, new in ((logits_BV, read[0]), (state.position_B, read[1].position_B))
    )
    # Rows of attention do not see what is written after their position.
    others = functools.partial(jax.tree.map, functools.partial(keep, 1))
    layers = join_states(config, state.layers, read[1].layers, others=others)
    return logits_BV, DecodeState(position_B, layers)


def prefill(config: ModelConfig, params, ids_BP, length_B, *, max_len: int):
    """Logits after each prompt [B, V], and the decoding state. Not to be called under `jit`.

    Args:
      config: the architecture.
      params: its parameters.
      ids_BP: prompts, padded on the right.
      length_B: their lengths, each at least 1.
      max_len: longest sequence the state must hold.
    """
    (ids, length), *others = _prompt_pieces(ids_BP, length_B)
    if not config.uses_attention:
        max_len = 0  # their state has one size: one program for all lengths
    found = call_together(read_first, config, params, ids, length, max_len=max_len)
    for ids, length in others:
        found = call_together(read_on, config, params, *found, ids, length)
    return found


def read_more(config: ModelConfig, params, logits_BV, state: DecodeState, ids: Sequence[int]):
    """Reads more tokens of a single row. Takes over the memory of the logits and the state.

    Returns:
      Logits after the last token [1, V], and the new state.
    """
    found = logits_BV, state
    for piece, length in _prompt_pieces(np.array([ids], np.int32), np.array([len(ids)])):
        found = call_together(read_on, config, params, *found, piece, length)
    return found


def _prompt_pieces(ids_BP, length_B) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pieces of prompts and how much of each row is in them. Widths are few: powers of two."""
    for start in range(0, ids_BP.shape[1], PROMPT_PIECE):
        piece = np.asarray(ids_BP[:, start : start + PROMPT_PIECE], np.int32)
        width = max(SHORTEST_PIECE, 1 << (piece.shape[1] - 1).bit_length())
        padded = np.pad(piece, ((0, 0), (0, width - piece.shape[1])))
        yield padded, np.clip(np.asarray(length_B) - start, 0, PROMPT_PIECE)


# --- writing


@functools.partial(
    jax.jit,
    static_argnames=("config", "size", "top_k", "num_ids"),
    donate_argnums=(2,),
)
def decode_loop(
    config: ModelConfig,
    params,
    rows: Rows,
    choice: Mapping[str, Any],
    end_id,
    first,
    limit,
    *,
    size: int,
    top_k: int,
    num_ids: int,
):
    """Generates tokens until every row has met its end token, or `size` or `limit` of them.

    Args:
      config: the architecture.
      params: its parameters.
      rows: whose memory is taken over.
      choice: from `Sampling.numbers`.
      end_id: a row ends before this token.
      first: how many new tokens the rows have: it decides the draws.
      limit: how many new tokens the rows may have.
      size: of the piece, in tokens.
      top_k: as in `Sampling`.
      num_ids: ids to choose from.

    Returns:
      Tokens and their log-probabilities, [B, size]; how many of each row count, [B], without the
      end token; which have met it, [B]; and the rows.
    """
    choice = dict(choice)
    penalty = choice.pop("repetition_penalty", None)
    B = rows.logits_BV.shape[0]

    def unfinished(carry):
        i, rows, *_ = carry
        return (i < size) & (first + i < limit) & ~jnp.all(rows.done_B)

    def body(carry):
        i, rows, tokens, log_probs, length_B = carry
        logits_BV, seen_BV = rows.logits_BV[:, :num_ids], rows.seen_BV
        log_prob_BV = jax.nn.log_softmax(logits_BV)
        if penalty is not None:
            logits_BV = penalize(logits_BV, seen_BV, penalty)
        keys = jax.vmap(jax.random.fold_in, (0, None))(rows.keys_B, first + i)
        token_B = choose(logits_BV, keys, top_k=top_k, **choice)
        if penalty is not None:
            seen_BV = seen_BV.at[jnp.arange(B), token_B].set(True)
        done_B = rows.done_B | (token_B == end_id)
        length_B = jnp.where(done_B, length_B, i + 1)
        tokens = tokens.at[:, i].set(token_B)
        log_prob_B1 = jnp.take_along_axis(log_prob_BV, token_B[:, None], axis=1)
        log_probs = log_probs.at[:, i].set(log_prob_B1[:, 0].astype(log_probs.dtype))
        # One turn or none: around a `cond`, XLA would copy the state on GPUs.
        follows = (first + i + 1 < limit) & ~jnp.all(done_B)
        logits_BV, state = jax.lax.fori_loop(
            0,
            follows.astype(jnp.int32),
            lambda _, read: decode(config, params, read[1], token_B[:, None]),
            (rows.logits_BV, rows.state),
        )
        rows = Rows(logits_BV, state, rows.keys_B, seen_BV, done_B)
        return i + 1, rows, tokens, log_probs, length_B

    new = jnp.zeros((B, size), jnp.int32), jnp.zeros((B, size)), jnp.zeros(B, jnp.int32)
    _, rows, *new = jax.lax.while_loop(unfinished, body, (0, rows, *new))
    return *new, jnp.copy(rows.done_B), rows  # a copy: the next call takes over the rows


def begin(
    logits_BV,
    state: DecodeState,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    seed: int,
    first_row: int = 0,
    num_samples: int = 1,
    num_ids: int,
) -> Rows:
    """Rows that begin after the prompts, `num_samples` of each.

    Sample j of prompt i draws from the key `fold_in(fold_in(key(seed), first_row + i), j)`, so it
    does not depend on the other rows.
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"seed={seed}: must lie between 0 and 2**32 - 1")
    seen_BV = None
    if sampling.repetition_penalty != 1:
        seen_BV = np.zeros((len(prompts), num_ids), bool)
        for row, prompt in zip(seen_BV, prompts, strict=True):
            row[[token for token in set(prompt) if token < num_ids]] = True
    return call_together(
        start_rows, logits_BV, state, seen_BV, np.uint32(seed), first_row, num_samples
    )


@functools.partial(jax.jit, static_argnums=5)
def start_rows(logits_BV, state, seen_BV, seed, first_row, num_samples: int) -> Rows:
    """The rows of `begin`; every row of what was read, `num_samples` times."""
    B = logits_BV.shape[0]
    i = jnp.repeat(first_row + jnp.arange(B), num_samples)
    j = jnp.tile(jnp.arange(num_samples), B)
    keys = jax.vmap(lambda i, j: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), i), j))
    if num_samples > 1:  # otherwise what was read is passed on without a copy
        logits_BV, position_B, seen_BV = jax.tree.map(
            lambda a: jnp.repeat(a, num_samples, axis=0), (logits_BV, state.position_B, seen_BV)
        )
        layers = jax.tree.map(lambda a: jnp.repeat(a, num_samples, axis=1), state.layers)
        state = DecodeState(position_B, layers)
    done_B = jnp.zeros(B * num_samples, bool)
    return Rows(logits_BV, state, keys(i, j), seen_BV, done_B)


def pieces(
    config: ModelConfig,
    params: Any,
    rows: Rows,
    sampling: Sampling,
    *,
    size: int,
    max_new_tokens: int,
    end_id: int | None,
    num_ids: int,
    mesh: Mesh | None,
) -> Iterator[Piece]:
    """Continues rows, `size` tokens at a time, until all have met `end_id` or the limit.

    The devices work on the next piece while the caller has this one.
    """

    def launch(first):
        nonlocal rows
        with on(mesh, split_rows=False):
            *new, rows = call_together(
                decode_loop,
                config,
                params,
                rows,
                sampling.numbers(),
                np.int32(-1 if end_id is None else end_id),
                np.int32(first),
                np.int32(max_new_tokens),
                size=size,
                top_k=sampling.top_k if sampling.temperature > 0 else 0,
                num_ids=num_ids,
            )
            return new

    following = launch(0)
    for first in range(0, max_new_tokens, size):
        current = following
        if first + size < max_new_tokens:
            following = launch(first + size)
        with on(mesh, split_rows=False):
            piece = Piece(*map(fetch, current))
        yield piece
        if piece.done_B.all():
            return


def generate(
    config: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    num_samples: int = 1,
    seed: int = 0,
    end_id: int | None = None,
    num_ids: int | None = None,
    mesh: Mesh | None = None,
    **sampling: Any,
) -> list[np.ndarray]:
    """Continues prompts of any lengths together; returns the new tokens of each sample, int32.

    A sample does not depend on the other prompts or samples. The samples of a prompt stand
    together.

    Args:
      config: the architecture.
      params: its parameters.
      prompts: token ids, at least one in each.
      max_new_tokens: limit for each row.
      num_samples: of each prompt, which is read once.
      seed: decides the draw.
      end_id: a row stops before this token; None never stops.
      num_ids: draw only ids below this, if the tokenizer has fewer than the model; None: all.
      mesh: over which the parameters are sharded; None for a single device. Every device computes
        all rows.
      **sampling: the fields of `Sampling`.

    Raises:
      InputError: an empty prompt, an id outside the vocabulary, a sampling setting out of range;
        or, with attention, a length beyond `config.max_seq_len`.
    """
    how = Sampling(**sampling)
    num_ids = config.vocab_size if num_ids is None else num_ids
    rows = read_prompts(
        config,
        params,
        prompts,
        how,
        max_new_tokens=max_new_tokens,
        num_samples=num_samples,
        seed=seed,
        num_ids=num_ids,
        mesh=mesh,
    )
    (piece,) = pieces(
        config,
        params,
        rows,
        how,
        size=max_new_tokens,
        max_new_tokens=max_new_tokens,
        end_id=end_id,
        num_ids=num_ids,
        mesh=mesh,
    )
    return [row[:n] for row, n in zip(piece.tokens_Bn, piece.length_B, strict=True)]


def read_prompts(
    config: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    num_samples: int,
    seed: int,
    num_ids: int,
    mesh: Mesh | None,
) -> Rows:
    """Rows after the prompts, for `pieces`. Arguments and errors are those of `generate`."""
    _check(config, prompts, max_new_tokens, num_samples)
    length_B = np.array([len(prompt) for prompt in prompts])
    ids_BP = np.zeros((len(prompts), length_B.max()), np.int32)
    for row, prompt in zip(ids_BP, prompts, strict=True):
        row[: len(prompt)] = prompt
    # Rounded up, so that few sizes of the cache are compiled.
    max_len = min(-(-ids_BP.shape[1] // 32) * 32 + max_new_tokens, config.max_seq_len)
    with on(mesh, split_rows=False):
        read = prefill(config, params, ids_BP, length_B, max_len=max_len)
        return begin(*read, prompts, sampling, seed=seed, num_samples=num_samples, num_ids=num_ids)


def _check(config, prompts, max_new_tokens, num_samples) -> None:
    def require(condition: bool, message: str) -> None:
        if not condition:
            raise InputError(message)

    lengths = [len(prompt) for prompt in prompts]
    require(len(prompts) > 0, "prompts is empty: give at least one")
    require(min(lengths, default=1) > 0, "a prompt has no tokens: give at least one token")
    require(
        0 < max_new_tokens < 2**31, f"max_new_tokens={max_new_tokens}: must be from 1 to 2**31 - 1"
    )
    require(
        0 < len(prompts) * num_samples <= MOST_ROWS,
        f"num_samples={num_samples}: must be positive, and with {plural(len(prompts), 'prompt')} "
        f"give at most {MOST_ROWS:,} texts; draw more with other seeds",
    )
    for prompt in prompts:
        low, high = min(prompt), max(prompt)
        require(
            0 <= low and high < config.vocab_size,
            f"token id {low if low < 0 else high} in a prompt: ids run from 0 to "
            f"{config.vocab_size - 1}",
        )
    if max(lengths) + max_new_tokens > config.max_seq_len:
        beyond = (
            f"a prompt of {plural(max(lengths), 'token')} and max_new_tokens={max_new_tokens} "
            f"exceed model.max_seq_len={config.max_seq_len}"
        )
        require(
            not config.uses_attention,
            f"{beyond}: lower max_new_tokens or shorten the prompt",
        )
        say(f"{beyond}: the model was not trained on sequences of that length")
