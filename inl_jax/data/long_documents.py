"""A long document in parts: the tokens are those of the whole text, wherever it was cut.

Some cuts are safe for a tokenizer. At any other cut, the next part is encoded with the end of the
text before it, and the two are joined in the middle of tokens that they share. For a BPE this is
exact: its tokens are right if every two neighbours are, and neighbours at the seam are neighbours
in a part. For other models the shared tokens are many more than a word.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from inl_jax.console import say
from inl_jax.data.tokenizer import Tokenizer
from inl_jax.text.documents import Pieces

OVERLAP = 2**12
"""Characters that are encoded with both parts at a cut."""
SHARED = 16
"""Tokens on either side of a seam that both parts have at the same places."""
LONGEST = 2**20
"""Characters that are encoded at once, at most, if parts share no tokens."""


class Part(NamedTuple):
    """A part of a document's text."""

    text: str
    before: str = ""
    """The text before it that is encoded with it; empty if the cut there is safe."""
    start: int = 0
    """Characters of the document before `before`."""
    cut: bool = False
    """Whether the cut after it is not safe."""
    bad_utf8: int = 0
    """Invalid UTF-8 sequences that were replaced in it."""

    @property
    def length(self) -> int:
        """Characters that are encoded."""
        return len(self.before) + len(self.text)

    @property
    def end(self) -> int:
        """Characters of the document up to its end."""
        return self.start + self.length


def parts(pieces: Pieces, tokenizer: Tokenizer) -> Iterator[Part]:
    """The parts of one document, from its pieces."""
    part, seen = None, ""
    for text, bad in pieces:
        if part:
            cut = not tokenizer.is_safe_cut(part.text, text)
            yield part._replace(cut=cut)
            before = seen[-OVERLAP:] if cut else ""
            part = Part(text, before, part.end - len(before), bad_utf8=bad)
        else:
            part = Part(text, bad_utf8=bad)
        seen = text if len(text) >= OVERLAP else seen[-OVERLAP:] + text
    if part:
        yield part


class Encoder:
    """Encodes documents, part by part, in their order."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._held = Part("")  # encoded, and not all written, since the cut after it is not safe
        self._tokens = np.empty((0, 3), np.int64)  # of `_held`, as `_encode` gives them
        self._written = 0  # how many of these are written

    def encode(self, batch: Sequence[Part]) -> list[np.ndarray]:
        """The ids that can be written after each part. The part before a safe cut gives the rest.

        Ids `[tokens]` of the tokenizer's dtype, without the end token.
        """
        whole = [part for part in batch if not (part.before or part.cut)]
        ready = iter(self._tokenizer.encode_batch([part.text for part in whole]))
        cut = [part for part in batch if part.before or part.cut]
        tokens = iter(self._encode(cut))
        return [
            self._join(part, next(tokens)) if part.before or part.cut else next(ready)
            for part in batch
        ]

    def _encode(self, batch: Sequence[Part]) -> list[np.ndarray]:
        """The tokens `[tokens, 3]` of parts: id, and the document's characters begin:end."""
        found = self._tokenizer.encode_places([part.before + part.text for part in batch])
        return [
            tokens + (0, part.start, part.start) for tokens, part in zip(found, batch, strict=True)
        ]

    def _join(self, part: Part, tokens: np.ndarray) -> np.ndarray:
        """The ids that can be written after `part`, which has these tokens; holds the rest."""
        ready, first = self._tokens[:0], 0
        if part.before:
            seam = self._find_seam(part, tokens)
            if seam is None:  # a run of digits is split in threes from its beginning: keep in step
                at = np.searchsorted(self._tokens[:, 1], part.start)
                start = self._tokens[: at + 1, 1].max(initial=self._held.start)
                part, tokens = self._encode_from(start, part)
                seam = self._find_seam(part, tokens)
            if seam:
                ready, first = self._tokens[self._written : seam[0]], seam[1]
            elif self._held.length + len(part.text) <= LONGEST:
                part, tokens = self._encode_from(self._held.start, part)
                first = self._written
            else:
                say(
                    f"WARNING: {self._held.length:,} characters of a document cannot be encoded in "
                    f"parts by {self._tokenizer.name}; it is cut after character "
                    f"{self._held.end:,}"
                )
                ready = self._tokens[self._written :]
                part, tokens = self._encode_from(self._held.end, part)
        if part.cut:
            self._held, self._tokens, self._written = part, tokens, first
        else:
            ready = np.concatenate([ready, tokens[first:]])
        ids = ready[:, 0]
        return ids[ids != self._tokenizer.end_id].astype(self._tokenizer.dtype)

    def _encode_from(self, start: int, part: Part) -> tuple[Part, np.ndarray]:
        """`part` with the text before it from character `start` on, and its tokens."""
        held = self._held
        before = (held.before + held.text)[start - held.start :]
        part = part._replace(before=before, start=int(start))
        return part, self._encode([part])[0]

    def _find_seam(self, part: Part, tokens: np.ndarray) -> tuple[int, int] | None:
        """Where tokens are joined, if anywhere: those held up to i, those of `part` from j on.

        Not near the ends of the common text, where tokens may depend on what is cut off.
        """
        left, margin = self._tokens, OVERLAP // 4
        span = (part.start + margin, self._held.end - margin)
        low, high = np.searchsorted(left[:, 1], span)
        low = max(low, self._written, SHARED)
        high = min(high, len(left) - SHARED)
        for i in sorted(range(low, high), key=lambda i: abs(2 * i - low - high)):
            j = int(np.searchsorted(tokens[:, 1], left[i, 1]))
            shared = tokens[max(0, j - SHARED) : j + SHARED]
            if np.array_equal(left[i - SHARED : i + SHARED], shared):
                return i, j
        return None
