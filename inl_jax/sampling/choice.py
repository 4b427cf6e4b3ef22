"""Which token comes next: the settings, and a draw from the logits.

In the order of transformers: repetition penalty, temperature, top_k, top_p, min_p.

Shapes: B rows, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from inl_jax.checks import check_types, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. By default: the likeliest token.

    Raises:
      InputError: a setting is out of range.
    """

    temperature: float = 0.0
    """Divides the logits. 0 takes the likeliest token (greedy), whatever top_k, top_p and min_p."""
    top_k: int = 0
    """Draw from the k likeliest tokens. With 0: from all."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities reach p. With 1: from all."""
    min_p: float = 0.0
    """Draw from the tokens at least min_p times as likely as the likeliest, at the temperature
    (Nguyen et al., 2024). With 0: from all."""
    repetition_penalty: float = 1.0
    """Divides the positive logits, and multiplies the negative ones, of every token in the prompt
    or generated so far (Keskar et al., 2019). 1: none; above 1 they become less likely."""

    def __post_init__(self):
        check_types(self, "")
        t = self.temperature
        for name, fits, range_ in (
            (
                "temperature",
                t == 0 or 1e-6 <= t <= 1e6,
                "0 (greedy), or from 0.000001 to 1,000,000",
            ),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 (off) to 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100"),
        ):
            require(fits, f"{name}={getattr(self, name)}: must be {range_}")

    def numbers(self) -> dict[str, np.float32]:
        """The settings, but for top_k, that change the choice: what a compiled program is given."""
        names = ["repetition_penalty"] if self.repetition_penalty != 1 else []
        if self.temperature > 0:
            names.append("temperature")
            names += ["top_p"] if self.top_p < 1 else []
            names += ["min_p"] if self.min_p > 0 else []
        return {name: np.float32(getattr(self, name)) for name in names}


def choose(logits_BV, keys_B, *, temperature=None, top_k: int = 0, top_p=None, min_p=None):
    """One token per row, int32 [B].

    Args:
      logits_BV: float32 logits.
      keys_B: a key for each row.
      temperature: divides the logits; above 0. None takes the likeliest token.
      top_k: keep the k likeliest tokens; 0 keeps all. Ties with the k-th are kept.
      top_p: then keep the fewest tokens whose probabilities reach p (at least one, and all that
        are exactly as likely as the last); None keeps all.
      min_p: then keep the tokens whose probability is at least min_p times the largest; None keeps
        all.
    """
    if temperature is None:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    # From the maximum down, so that a tiny temperature makes -inf and never inf.
    logits_BV = (logits_BV - logits_BV.max(axis=-1, keepdims=True)) / temperature
    if top_k > 0:
        kth_B1 = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
    if top_p is not None:
        sorted_BV = -jnp.sort(-logits_BV, axis=-1)
        probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
        least_B1 = jnp.min(jnp.where(before_BV < top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if min_p is not None:  # the largest logit is 0
        logits_BV = jnp.where(logits_BV < jnp.log(min_p), -jnp.inf, logits_BV)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def penalize(logits_BV, seen_BV, penalty) -> jax.Array:
    """The logits with the repetition penalty on the tokens that each row has seen, bool [B, V]."""
    lowered_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, lowered_BV, logits_BV)
