"""Ids to ids: one compiled prefill, one compiled loop of single tokens."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from inl_jax.config import InputError, ModelConfig
from inl_jax.console import plural
from inl_jax.model.language_model import DecodeState, decode, init_decode_state
from inl_jax.parallel.processes import call_together
from inl_jax.parallel.sharding import fetch, on
from inl_jax.sampling.choice import choose


@functools.partial(jax.jit, static_argnames=("config", "max_len"))
def prefill(config: ModelConfig, params, ids_BP, length_B, *, max_len: int):
    """Logits after each prompt [B, V], and the decoding state.

    Args:
      config: the architecture.
      params: its parameters.
      ids_BP: prompts, padded on the right.
      length_B: their lengths.
      max_len: longest sequence the state must hold.
    """
    state = init_decode_state(config, ids_BP.shape[0], max_len)
    return decode(config, params, state, ids_BP, length_B)


@functools.partial(
    jax.jit,
    static_argnames=("config", "max_new_tokens", "greedy", "top_k", "num_ids"),
    donate_argnums=(3,),
)
def decode_loop(
    config: ModelConfig,
    params,
    logits_BV,
    state: DecodeState,
    keys_B,
    end_id,
    temperature,
    top_p,
    *,
    max_new_tokens: int,
    greedy: bool,
    top_k: int,
    num_ids: int,
):
    """Generates until every row has met its end token or the limit.

    Returns:
      Tokens [B, max_new_tokens]; how many of each row count, [B], without the end token; and the
      state, which takes over the memory of the donated one.
    """
    B = logits_BV.shape[0]

    def pick(logits_BV, i):
        logits_BV = logits_BV[:, :num_ids]
        if greedy:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, i)
        return choose(logits_BV, keys, temperature=temperature, top_k=top_k, top_p=top_p)

    def unfinished(carry):
        i, *_, done_B = carry
        return (i < max_new_tokens) & ~jnp.all(done_B)

    def body(carry):
        i, logits_BV, state, tokens, length_B, done_B = carry
        token_B = pick(logits_BV, i)
        done_B |= token_B == end_id
        length_B = jnp.where(done_B, length_B, i + 1)
        tokens = tokens.at[:, i].set(token_B)
        logits_BV, state = decode(config, params, state, token_B[:, None])
        return i + 1, logits_BV, state, tokens, length_B, done_B

    tokens = jnp.zeros((B, max_new_tokens), jnp.int32)
    carry = (0, logits_BV, state, tokens, jnp.zeros(B, jnp.int32), jnp.zeros(B, bool))
    _, _, state, tokens, length_B, _ = jax.lax.while_loop(unfinished, body, carry)
    return tokens, length_B, state


def generate(
    config: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    end_id: int | None = None,
    num_ids: int | None = None,
    mesh: Mesh | None = None,
) -> list[np.ndarray]:
    """Continues prompts of any lengths together; returns the new tokens of each, int32.

    Row i draws from the key `fold_in(key(seed), i)`, so a row's sample does not depend on the
    other rows.

    Args:
      config: the architecture.
      params: its parameters.
      prompts: token ids, at least one in each.
      max_new_tokens: limit for each row.
      temperature: 0 takes the likeliest token; otherwise divides the logits.
      top_k: draw from the k likeliest tokens; 0 from all.
      top_p: draw from the fewest tokens whose probabilities reach p; 1 from all.
      seed: decides the draw.
      end_id: a row stops before this token; None never stops.
      num_ids: draw only ids below this, if the tokenizer has fewer than the model; None: all.
      mesh: over which the parameters are sharded; None for a single device. Every device computes
        all rows.

    Raises:
      InputError: an empty prompt, an id outside the vocabulary, a length beyond
        `config.max_seq_len`, or a sampling setting out of range.
    """
    lengths = [len(prompt) for prompt in prompts]
    _check(config, prompts, lengths, max_new_tokens, temperature, top_k, top_p)
    if not 0 <= seed < 2**32:
        raise InputError(f"seed={seed}: must lie between 0 and 2**32 - 1")
    # Padded to a multiple of 32, so that few lengths are compiled.
    padded = min(-(-max(lengths) // 32) * 32, config.max_seq_len)
    ids_BP = np.zeros((len(prompts), padded), np.int32)
    for row, prompt in zip(ids_BP, prompts, strict=True):
        row[: len(prompt)] = prompt
    max_len = min(padded + max_new_tokens, config.max_seq_len)
    with on(mesh, split_rows=False):
        logits_BV, state = call_together(
            prefill, config, params, ids_BP, np.array(lengths), max_len=max_len
        )
        rows_B = jnp.arange(len(prompts))
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows_B)
        tokens, length_B, _ = call_together(
            decode_loop,
            config,
            params,
            logits_BV,
            state,
            keys_B,
            np.int32(-1 if end_id is None else end_id),
            np.float32(temperature),
            None if top_p == 1 else np.float32(top_p),
            max_new_tokens=max_new_tokens,
            greedy=temperature == 0,
            top_k=top_k,
            num_ids=config.vocab_size if num_ids is None else num_ids,
        )
        return [row[:n] for row, n in zip(fetch(tokens), fetch(length_B), strict=True)]


def _check(config, prompts, lengths, max_new_tokens, temperature, top_k, top_p) -> None:
    def require(condition: bool, message: str) -> None:
        if not condition:
            raise InputError(message)

    require(len(prompts) > 0, "prompts is empty: give at least one")
    require(min(lengths, default=1) > 0, "a prompt has no tokens: give at least one token")
    require(max_new_tokens > 0, f"max_new_tokens={max_new_tokens}: must be positive")
    require(temperature >= 0, f"temperature={temperature}: must be 0 (greedy) or more")
    require(top_k >= 0, f"top_k={top_k}: must be 0 (off) or more")
    require(0 < top_p <= 1, f"top_p={top_p}: must be above 0 and at most 1")
    require(
        max(lengths) + max_new_tokens <= config.max_seq_len,
        f"a prompt of {plural(max(lengths), 'token')} and max_new_tokens={max_new_tokens} exceed "
        f"model.max_seq_len={config.max_seq_len}: lower max_new_tokens or shorten the prompt",
    )
    for prompt in prompts:
        low, high = min(prompt), max(prompt)
        require(
            0 <= low and high < config.vocab_size,
            f"token id {low if low < 0 else high} in a prompt: ids run from 0 to "
            f"{config.vocab_size - 1}",
        )
