"""Text that grows by tokens: whole characters alone, and never past a stop string."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from inl_jax.checks import require
from inl_jax.sampling.decoding import Piece
from inl_jax.tokens.tokenizer import Tokenizer

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""At the end of a text: bytes that may become a character with those that follow."""


class Continuation:
    """The text that a model adds to a prompt.

    Tokens are added one by one, so the text does not depend on how many come at once.

    Attributes:
      prompt: the prompt.
      text: what is certain so far, without a stop string. Bytes at its end that make no whole
        character are left out.
      taken: the part of it that `take` has given out.
      num_tokens: tokens that were generated for it, up to the one that completed a stop string.
      finish_reason: "stop" for a stop string, "end" for the end token, "length" for the limit; None
        while it grows.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: str,
        prompt_ids: Sequence[int],
        *,
        limit: int,
        stop: str | Sequence[str] = (),
    ):
        """Takes the prompt as text and as ids, a limit in tokens, and the stop strings.

        Raises:
          InputError: a stop string is empty.
        """
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        require(all(stop), "a stop string is empty: give at least one character")
        self.prompt = prompt
        self.text = ""
        self.taken = ""
        self.num_tokens = 0
        self.finish_reason: Literal["stop", "end", "length"] | None = None
        self._tokenizer, self._limit, self._stop = tokenizer, limit, stop
        self._log_prob = 0.0
        self._prompt_ids, self._tokens = list(prompt_ids), []
        # Tokens before the last whole character, enough of them to decode what follows; what they
        # say alone; the tokens since then; and the text before these.
        self._context, self._context_text = self._prompt_ids, prompt
        self._ids: list[int] = []
        self._settled = ""

    @property
    def mean_log_probability(self) -> float | None:
        """Of its tokens, by the model at temperature 1 without other settings; None without any."""
        return self._log_prob / self.num_tokens if self.num_tokens else None

    def record(self) -> dict[str, Any]:
        """What is known of it, as JSON has it."""
        names = ("prompt", "text", "num_tokens", "finish_reason", "mean_log_probability")
        return {name: getattr(self, name) for name in names}

    def add(self, tokens: Iterable[int], log_probs: Iterable[float], *, ended: bool) -> None:
        """Adds tokens with their log-probabilities, until the text is finished.

        Args:
          tokens: the next ids.
          log_probs: one for each.
          ended: whether the end token follows them.
        """
        for token, log_prob in zip(tokens, log_probs, strict=True):
            if self.finish_reason:
                return
            self.num_tokens += 1
            self._log_prob += float(log_prob)
            self._add(int(token))
            if not self.finish_reason and self.num_tokens == self._limit:
                self.finish_reason = "length"
        if ended and not self.finish_reason:
            self.finish_reason = "end"

    def _add(self, token: int) -> None:
        self._tokens.append(token)
        self._ids.append(token)
        new = self._tokenizer.decode_after(self._context_text, self._context, self._ids)
        certain, searched = new.rstrip(INCOMPLETE), len(self.text)
        self.text = self._settled + certain
        found = self._find_stop(searched)
        if found is not None:
            self.text, self.finish_reason = self.text[:found], "stop"
        elif certain and certain == new:
            self._settled, self._context, self._ids = self.text, self._ids, []
            self._context_text = self._tokenizer.decode(self._context)

    def _find_stop(self, searched: int) -> int | None:
        """Where the stop string begins that is complete first; of several, the longest."""
        found = []
        for stop in self._stop:
            at = self.text.find(stop, max(0, searched - len(stop) + 1))
            if at >= 0:
                found.append((at + len(stop), at))
        return min(found)[1] if found else None

    def take(self) -> str:
        """The text since the last call that is certain: it cannot become part of a stop string."""
        until = len(self.text)
        if not self.finish_reason:
            until -= max((_begun(self.text, stop) for stop in self._stop), default=0)
        new = self.text[len(self.taken) : until]
        self.taken += new
        return new

    def taken_ids(self) -> list[int]:
        """The ids of `taken`: its tokens, the last one encoded anew if it was cut."""
        for n in range(len(self._tokens), -1, -1):
            text = self._tokenizer.decode_after(self.prompt, self._prompt_ids, self._tokens[:n])
            if self.taken.startswith(text):
                break
        return [*self._tokens[:n], *encode_after(self._tokenizer, self.taken[len(text) :])]


def grown(texts: list[Continuation], pieces: Iterable[Piece]) -> Iterator[list[Continuation]]:
    """Adds pieces to texts, one a row, until all are finished; yields the texts after each."""
    for piece in pieces:
        for b, (text, n) in enumerate(zip(texts, piece.length_B, strict=True)):
            ended = bool(piece.done_B[b])
            text.add(piece.tokens_Bn[b, :n], piece.log_probs_Bn[b, :n], ended=ended)
        yield texts
        if all(text.finish_reason for text in texts):
            return


def encode_after(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text that follows another: many tokenizers begin a text with a space."""
    for other in ("\n", "."):  # one of them shares no token with the text
        before, ids = tokenizer.encode(other), tokenizer.encode(other + text)
        if ids[: len(before)].tolist() == before.tolist():
            return ids[len(before) :].tolist()
    return tokenizer.encode(text).tolist()


def _begun(text: str, stop: str) -> int:
    """How many characters of `stop`, but not all, stand at the end of `text`."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)
