"""Token files to batches. A batch is a pure function of (seed, index).

Windows of `seq_len + 1` tokens are reshuffled by grain in each epoch and read in threads. Sample i
of a run depends neither on the number of processes nor on the batch size nor on where a run
resumed, so a position in the data is one integer: the number of samples consumed.

B is the batch, S the sequence length.
"""

import collections
import itertools
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from inl_jax.config import DataConfig, InputError
from inl_jax.data.corpus import Corpus
from inl_jax.data.phases import Curriculum, PhasedSamples
from inl_jax.data.token_files import TokenFiles

if TYPE_CHECKING:
    import grain  # here and in the function below only: it imports jax


READ_AHEAD = 8  # batches


class Windows:
    """The training windows of one source, int32 [S + 1]; the next starts S tokens further on.

    Reading one raises what `Tokens` raises.
    """

    def __init__(self, files: TokenFiles, seq_len: int):
        self._tokens, self._seq_len = files.open("train"), seq_len
        self._len = count_windows(files, seq_len)

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, index) -> np.ndarray:
        start = int(index) * self._seq_len
        return self._tokens[start : start + self._seq_len + 1].astype(np.int32)


class EvalBatch(NamedTuple):
    """B windows of the validation split."""

    inputs: np.ndarray
    """Tokens, int32 [B, S]."""
    targets: np.ndarray
    """The token that follows each input, int32 [B, S]."""
    weights: np.ndarray
    """1 for targets, 0 for padding, float32 [B, S]."""
    num_bytes: np.ndarray
    """UTF-8 bytes that the targets of a row stand for, float32 [B]."""
    source: np.ndarray
    """Index of the corpus's source that a row is from, int32 [B]; 0 for rows of weight 0."""


def count_windows(files: TokenFiles, seq_len: int) -> int:
    """Number of training windows in one source."""
    return max(0, (files.train_tokens - 1) // seq_len)


def check(corpus: Corpus, vocab_size: int) -> None:
    """Checks that a model of `vocab_size` has all ids of the tokenizer.

    Raises:
      InputError: it has not.
    """
    if corpus.tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"model.vocab_size={vocab_size}: tokenizer {corpus.tokenizer.name} has "
            f"{corpus.tokenizer.vocab_size} ids; set model.vocab_size to at least that, or name "
            "the tokenizer of the model"
        )


def check_windows(corpus: Corpus, data: DataConfig) -> None:
    """Raises `InputError` if a source has fewer training tokens than one window."""
    for files in corpus.sources:
        if count_windows(files, data.seq_len) == 0:
            raise InputError(
                f"{files.train_tokens} training tokens in {files.directory}: fewer than one "
                f"window of data.seq_len={data.seq_len} + 1; add text, or lower data.seq_len or "
                f"data.validation_fraction={data.validation_fraction}"
            )


def training_samples(
    corpus: Corpus, data: DataConfig, seed: int, curriculum: Curriculum | None = None
) -> "grain.MapDataset | PhasedSamples":
    """The endless sequence of training windows: sources shuffled each epoch, and mixed by weight.

    With a curriculum they are mixed by phase, and may be parts of windows.
    """
    import grain

    datasets = [
        grain.MapDataset.source(Windows(files, data.seq_len)).seed(seed + i).shuffle().repeat()
        for i, files in enumerate(corpus.sources)
    ]
    if data.phases:
        return PhasedSamples(datasets, curriculum)
    if len(datasets) == 1:
        return datasets[0]
    return grain.MapDataset.mix(datasets, weights=corpus.weights)


def training_batches(
    samples: "grain.MapDataset | PhasedSamples",
    *,
    position: int,
    batch_size: int,
    rows: slice,
    num_batches: int,
) -> Iterator[np.ndarray]:
    """Yields this process's rows of each batch, int32 [rows, S + 1]; threads read ahead.

    Args:
      samples: from `training_samples`.
      position: samples consumed before the first batch.
      batch_size: rows of a global batch.
      rows: the rows of each global batch that this process reads.
      num_batches: number of batches to yield.

    Raises:
      InputError: the tokens cannot be read, or are damaged.
    """

    def batch(index: int) -> np.ndarray:
        first = position + index * batch_size
        return np.stack([samples[first + row] for row in range(rows.start, rows.stop)])

    # Daemon threads, unlike grain's: a read that never returns does not keep the process.
    with ThreadPool(2) as pool:
        ahead = collections.deque()
        for index in range(num_batches):
            ahead.append(pool.apply_async(batch, (index,)))
            if len(ahead) > READ_AHEAD:
                yield ahead.popleft().get()
        while ahead:
            yield ahead.popleft().get()


def eval_batches(
    corpus: Corpus, *, seq_len: int, batch_size: int, max_sequences: int = 0
) -> Iterator[EvalBatch]:
    """Yields the validation split in fixed windows. Every token is a target exactly once.

    The input before the first token of a source is an end token. Rows of weight 0 fill the last
    batch. The bytes of a row are its tokens times the mean bytes per token of its source, so over
    the whole split they add up to the bytes of the text.

    Args:
      corpus: prepared tokens.
      seq_len: targets per window, S.
      batch_size: rows per batch, B.
      max_sequences: number of windows, spread evenly over the sources; 0 reads all.
    """
    windows = _eval_windows(corpus, seq_len, max_sequences)
    while rows := list(itertools.islice(windows, batch_size)):
        batch = EvalBatch(*(np.stack(part) for part in zip(*rows, strict=True)))
        missing = batch_size - len(rows)
        yield EvalBatch(
            *(np.pad(part, ((0, missing),) + ((0, 0),) * (part.ndim - 1)) for part in batch)
        )


def _eval_windows(corpus: Corpus, seq_len: int, max_sequences: int) -> Iterator[EvalBatch]:
    counts = [-(-files.validation_tokens // seq_len) for files in corpus.sources]
    share = min(1.0, max_sequences / max(1, sum(counts)) or 1.0)
    parts = np.diff(np.round(np.cumsum([0, *counts]) * share).astype(int))  # by size
    for source, (files, count, wanted) in enumerate(
        zip(corpus.sources, counts, parts, strict=True)
    ):
        tokens = files.open("validation")
        bytes_per_token = files.validation_bytes / max(1, len(tokens))
        # Evenly spaced: the same windows each time, from all of the split.
        for index in np.arange(wanted) * count // max(1, wanted):
            start = int(index) * seq_len
            targets = tokens[start : start + seq_len].astype(np.int32)
            before = tokens[start - 1 : start] if start else [corpus.tokenizer.end_id]
            inputs = np.concatenate([before, targets[:-1]], dtype=np.int32)
            missing = (0, seq_len - len(targets))
            weights = np.ones(len(targets), np.float32)
            yield EvalBatch(
                *(np.pad(part, missing) for part in (inputs, targets, weights)),
                np.float32(len(targets) * bytes_per_token),
                np.int32(source),
            )
