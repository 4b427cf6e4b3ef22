"""A long document in parts: the tokens are those of the whole text, wherever it was cut.

Some cuts are safe for a tokenizer. At any other cut, the next part is encoded together with the end
of the text before it, which is also encoded alone. If the part before ends with the tokens of this
common text, and the next part begins with them, the two are joined in the middle of these. For a
BPE this is exact: its tokens are right if every two neighbours are, and the neighbours at a seam
are neighbours in both parts.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from inl_jax.console import say
from inl_jax.limits import usable_cpus
from inl_jax.text.documents import Pieces
from inl_jax.tokens.tokenizer import Tokenizer

OVERLAP = 2**12
"""Characters that are encoded with both parts at a cut."""
SHARED = 16
"""Tokens on either side of a seam that both parts have."""
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


class Common(NamedTuple):
    """The ids of the text before a part, encoded alone."""

    ids: np.ndarray
    low: int
    """From this one on they are the same without the first quarter of the text."""
    high: int
    """Up to this one they are the same without the last quarter of the text."""


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

    def __init__(self, tokenizer: Tokenizer, pool: ThreadPoolExecutor):
        """Takes the threads that encode."""
        self._tokenizer, self._pool = tokenizer, pool
        self._held = Part("")  # not all of its ids are given out, since the cut after it is unsafe
        self._ids = np.empty(0, tokenizer.dtype)  # of it and the text before it
        self._given = 0  # how many of these are given out

    def encode(self, batches: Iterable[Sequence[Part]]) -> Iterator[list[np.ndarray]]:
        """The ids `[tokens]` that are certain after each part, without an end token.

        Some batches are read ahead, for the threads to encode while the caller uses the ids.
        """
        ahead: deque[tuple[Sequence[Part], Future]] = deque()
        for batch in batches:
            ahead.append((batch, self._pool.submit(self._encode_parts, batch)))
            if len(ahead) > 2 * usable_cpus():
                yield self._join_all(*ahead.popleft())
        while ahead:
            yield self._join_all(*ahead.popleft())

    def _join_all(self, batch: Sequence[Part], encoded: Future) -> list[np.ndarray]:
        return list(itertools.starmap(self._join, zip(batch, *encoded.result(), strict=True)))

    def _encode_parts(self, batch: Sequence[Part]) -> tuple[list[np.ndarray], list[Common | None]]:
        """The ids of each part with the text before it, and of that text if there is any."""
        texts = [part.before + part.text for part in batch]
        for before in (part.before for part in batch if part.before):
            quarter = len(before) // 4
            texts += before, before[quarter:], before[: len(before) - quarter]
        encoded = iter(self._tokenizer.encode_batch(texts))
        ids = list(itertools.islice(encoded, len(batch)))
        commons = [_common(*itertools.islice(encoded, 3)) if p.before else None for p in batch]
        return ids, commons

    def _join(self, part: Part, ids: np.ndarray, common: Common | None) -> np.ndarray:
        """The ids that are certain after `part`; holds the rest.

        Args:
          part: the next part.
          ids: of its text and the text before it.
          common: of the text before it.
        """
        ready, first = self._ids[:0], 0
        if part.before:
            seam = self._find_seam(part, ids, common)
            if seam is None:  # a run of digits is split in threes from its beginning: keep in step
                part, ids, common = self._encode_from(self._token_start(part.start), part)
                seam = self._find_seam(part, ids, common)
            if seam:
                ready, first = self._ids[self._given : seam[0]], seam[1]
            elif self._held.length + len(part.text) <= LONGEST:
                part, ids, _ = self._encode_from(self._held.start, part)
                first = self._given
            else:
                say(
                    f"WARNING: {self._held.length:,} characters of a document cannot be encoded in "
                    f"parts by {self._tokenizer.name}; it is cut after character "
                    f"{self._held.end:,}"
                )
                ready = self._ids[self._given :]
                part, ids, _ = self._encode_from(self._held.end, part)
        if part.cut:
            self._held, self._ids, self._given = part, ids, first
            return ready
        return np.concatenate([ready, ids[first:]]) if part.before else ids

    def _find_seam(
        self, part: Part, ids: np.ndarray, common: Common | None
    ) -> tuple[int, int] | None:
        """Where ids are joined, if anywhere: the held ones up to i, those of the part from j on.

        In the middle half of the common text: tokens near an end may depend on what is cut off.
        """
        if len(part.before) < OVERLAP:
            return None
        length = len(common.ids)
        begins = length - _num_equal(self._ids[::-1], common.ids[::-1])  # held ids end with these
        low = max(begins + SHARED, common.low)
        high = min(_num_equal(ids, common.ids) - SHARED, common.high)
        j = (low + high) // 2
        i = len(self._ids) - length + j
        return (i, j) if low <= high and i >= self._given else None

    def _token_start(self, character: int) -> int:
        """The character of the document at which the last held token up to `character` begins."""
        start = self._held.start
        begins = start + self._tokenizer.token_starts(self._held.before + self._held.text)
        return int(begins[begins <= character].max(initial=start))

    def _encode_from(self, start: int, part: Part) -> tuple[Part, np.ndarray, Common | None]:
        """`part` with the text before it from character `start` on, and the ids as in `_join`."""
        before = (self._held.before + self._held.text)[start - self._held.start :]
        part = part._replace(before=before, start=start)
        (ids,), (common,) = self._encode_parts([part])
        return part, ids, common


def _common(whole: np.ndarray, late: np.ndarray, early: np.ndarray) -> Common:
    """Takes the ids of a text, of it without its first quarter, and without its last."""
    low = len(whole) - _num_equal(whole[::-1], late[::-1])
    return Common(whole, low, high=_num_equal(whole, early))


def _num_equal(a: np.ndarray, b: np.ndarray) -> int:
    """How many ids are equal before the first that differ."""
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length
