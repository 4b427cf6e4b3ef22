"""Which window of which source a sample of a run with phases is.

A source is shuffled and repeated in windows of `data.seq_len`, as in a run without phases, and each
phase reads it on where it was. A phase of shorter sequences takes the parts of a window in order.
All is a function of the sample's number, so the position of a run stays one integer.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from inl_jax.phase import Phase

BLOCK = 10_000
"""Samples after which the order of the sources repeats; weights are rounded to 1 in BLOCK."""


class Span(NamedTuple):
    """The samples `begin` to `end - 1` of a run, drawn by a phase."""

    number: int  # of the phase in data.phases, from 0
    phase: Phase
    begin: int
    end: int


class Mixture:
    """The order in which a phase draws its sources, evenly spread."""

    def __init__(self, weights: Sequence[float]):
        shares = np.cumsum(weights) / np.sum(weights)
        self._counts = np.diff(np.rint(BLOCK * shares), prepend=0).astype(np.int64)
        source = np.repeat(np.arange(len(weights)), self._counts)
        nth = np.concatenate([np.arange(count) for count in self._counts])
        order = np.argsort((nth + 0.5) / self._counts[source], kind="stable")
        self._source, self._nth = source[order].astype(np.int32), nth[order].astype(np.int32)

    def draw(self, index: int) -> tuple[int, int]:
        """The source of sample `index` of the phase, and how many that source gave before it."""
        blocks, index = divmod(index, BLOCK)
        source = int(self._source[index])
        return source, blocks * int(self._counts[source]) + int(self._nth[index])

    def drawn(self, num_samples: int) -> np.ndarray:
        """How many of the first `num_samples` of the phase each source gives."""
        blocks, rest = divmod(num_samples, BLOCK)
        return blocks * self._counts + np.bincount(self._source[:rest], minlength=len(self._counts))


class Curriculum:
    """The spans of a run, and where each of its samples is."""

    def __init__(self, spans: Sequence[Span], *, seq_len: int, num_sources: int):
        """Takes spans from sample 0 on, the last one endless, and `data.seq_len`.

        A phase with fewer weights than sources leaves the last sources out.
        """
        self.spans, self.seq_len = tuple(spans), seq_len
        self._begins = [span.begin for span in spans]
        weights = np.zeros((len(spans), num_sources))
        for row, span in zip(weights, spans, strict=True):
            row[: len(span.phase.weights)] = span.phase.weights
        self._mixtures = [Mixture(row) for row in weights]
        self._read = [np.zeros(num_sources, np.int64)]  # tokens of each source, before each span
        for at, span in enumerate(self.spans[:-1]):
            self._read.append(self._read_until(at, span.end))

    def place(self, sample: int) -> tuple[int, int, slice]:
        """The source of a sample, its window there, counted over all epochs, and which part."""
        at = bisect_right(self._begins, sample) - 1
        seq_len = self._seq_len(at)
        source, nth = self._mixtures[at].draw(sample - self._begins[at])
        first = -(-int(self._read[at][source]) // seq_len)
        window, start = divmod((first + nth) * seq_len, self.seq_len)
        return source, window, slice(start, start + seq_len + 1)

    def seq_len_of(self, sample: int) -> int:
        """Tokens of the sequence that is this sample, S."""
        return self._seq_len(bisect_right(self._begins, sample) - 1)

    def tokens(self, position: int) -> int:
        """Tokens trained on in the first `position` samples."""
        return sum(
            max(0, min(span.end, position) - span.begin) * self._seq_len(at)
            for at, span in enumerate(self.spans)
        )

    def tokens_read(self, position: int) -> np.ndarray:
        """How far each source is read after `position` samples, in tokens over all its epochs."""
        return self._read_until(bisect_right(self._begins, position) - 1, position)

    def _read_until(self, at: int, position: int) -> np.ndarray:
        drawn = self._mixtures[at].drawn(position - self._begins[at])
        seq_len, before = self._seq_len(at), self._read[at]
        return np.where(drawn > 0, (-(-before // seq_len) + drawn) * seq_len, before)

    def _seq_len(self, at: int) -> int:
        return self.spans[at].phase.seq_len or self.seq_len


class PhasedSamples:
    """The samples of a run, int32 [S + 1] with the S of their phase, from each source's windows."""

    def __init__(self, sources: Sequence[Sequence[np.ndarray]], curriculum: Curriculum):
        self._sources, self._curriculum = sources, curriculum

    def __getitem__(self, sample: int) -> np.ndarray:
        source, window, part = self._curriculum.place(sample)
        return self._sources[source][window][part]
