"""Text to token files: tokenised once, in a stream, and kept in the cache.

The tokenizer's end token follows every document.
"""

import functools
import hashlib
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from inl_jax.config import DataConfig, InputError
from inl_jax.console import duration, plural, progress_bar, say
from inl_jax.data.cache import (
    digest,
    identity,
    make_cache,
    publishing,
    read_finished,
    remove,
    remove_stale,
    write_meta,
)
from inl_jax.data.pins import pinned_paths, pinned_tokenizer
from inl_jax.data.token_files import TokenFiles
from inl_jax.limits import usable_cpus
from inl_jax.text.documents import Document, read_documents, split_file
from inl_jax.text.sources import Entry, find_entries
from inl_jax.tokens import tokenizer as tokenizers
from inl_jax.tokens.long_documents import Encoder, Part, parts
from inl_jax.tokens.tokenizer import Tokenizer

BATCH_BYTES = 2**18
"""UTF-8 bytes per call of the tokenizer, which may need 50 times as much memory for the call."""
BPE_SAMPLE_BYTES = 2**26
"""The most text, in UTF-8 bytes, that a BPE is trained on."""
SAMPLED_BYTES, SAMPLES, SAMPLE_LENGTH = 2**22, 8, 1000
"""Samples of each SAMPLED_BYTES, and their characters, that are encoded and decoded again."""
SECONDS_PER_LINE = 10
"""Time between two lines of progress if there is no terminal to show a bar on."""


@dataclass(frozen=True)
class Corpus:
    """Prepared tokens: one source per entry of `data.paths` if these are weighted, else one."""

    tokenizer: Tokenizer
    sources: tuple[TokenFiles, ...]
    weights: tuple[float, ...]
    """`data.weights`, or 1.0 for each source."""
    fingerprint: str
    """Hex digest of the sources' tokens and the tokenizer, without weights and places."""


def prepare(data: DataConfig, *, tokenizer: Tokenizer | None = None) -> Corpus:
    """Tokenises the sources of `data`, or finds their tokens in the cache.

    A hash of its text decides whether a document is held out, so neither its place nor its
    neighbours matter. If that leaves one split empty, the document nearest to it moves there;
    documents with the same text are never split. A source that is a single text file is split by
    position, at a line break.

    Args:
      data: sources, tokenizer, split and cache.
      tokenizer: used instead of `data.tokenizer`.

    Raises:
      InputError: a source is missing, empty or damaged, the tokenizer cannot be had, or the cache
        cannot be read or written.
      DiskFull: the tokens do not fit into the cache.
      OSError: reading or writing failed. Nothing that looks finished is left behind.
    """
    entries = find_entries(pinned_paths(data.paths), data)
    cache = make_cache(data.cache_dir)
    remove_stale(cache)
    if tokenizer is None:
        if data.tokenizer.startswith("bpe:"):
            tokenizer = _trained_bpe(entries, data, cache)
        else:
            tokenizer = tokenizers.load_tokenizer(pinned_tokenizer(data.tokenizer))
    groups = tuple((entry,) for entry in entries) if data.weights or data.phases else (entries,)
    sources = tuple(_prepare_source(group, data, tokenizer, cache) for group in groups)
    fingerprint = digest(*[files.fingerprint for files in sources])
    return Corpus(tokenizer, sources, data.weights or (1.0,) * len(sources), fingerprint)


def _trained_bpe(entries: tuple[Entry, ...], data: DataConfig, cache: Path) -> Tokenizer:
    """The BPE trained on all entries, from the cache if it is there.

    Each entry gives an equal share of BPE_SAMPLE_BYTES: every n-th of its pieces, with n such that
    they span the entry, documents held out included. A dataset of the hub gives its beginning,
    since its size is unknown.
    """
    vocab_size = tokenizers.bpe_vocab_size(data.tokenizer)
    key = digest("bpe", vocab_size, *identity(entries, data))
    directory = cache / f"tokenizer-{key}"
    if directory.is_dir():
        try:
            return tokenizers.load(directory)
        except InputError as error:
            if isinstance(error.__cause__, OSError):  # it may be whole, and be another user's
                raise
            say(f"WARNING: {error}; it is trained again")
            remove(directory)
    share = BPE_SAMPLE_BYTES // len(entries)

    def sample() -> Iterator[str]:
        for entry in entries:
            stride, room = max(1, math.ceil(entry.size() / share)), share
            documents = read_documents([entry], data)
            pieces = (text for document in documents for text, _ in document.pieces())
            for text in itertools.islice(pieces, 0, None, stride):
                yield text
                room -= len(text.encode())
                if room <= 0:
                    break

    started = time.monotonic()
    tokenizer = tokenizers.train_bpe(sample(), vocab_size)
    with publishing(directory) as temporary:
        tokenizer.save(temporary)
    seconds = time.monotonic() - started
    say(f"data: trained {data.tokenizer} ({tokenizer.vocab_size} ids) in {seconds:.1f} s")
    return tokenizers.load(directory)


def _prepare_source(
    entries: tuple[Entry, ...], data: DataConfig, tokenizer: Tokenizer, cache: Path
) -> TokenFiles:
    key = digest(*identity(entries, data), data.validation_fraction, tokenizer.fingerprint)
    directory = cache / key
    files = read_finished(directory, tokenizer)
    if files:
        say(
            f"data: {files.train_tokens:,} training + {files.validation_tokens:,} validation "
            f"tokens from the cache, {directory}"
        )
    else:
        with publishing(directory) as temporary:
            tokenizer.save(temporary)
            meta = _read_unchanged(entries, data, tokenizer, temporary)
            write_meta(temporary, meta)
        files = TokenFiles(directory, **meta)
        files.open("train")  # from now on they may be removed
    _say_if_nothing_validates(files.validation_tokens, data)
    _say_if_lossy(files, tokenizer)
    return files


def _read_unchanged(
    entries: tuple[Entry, ...], data: DataConfig, tokenizer: Tokenizer, directory: Path
) -> dict[str, Any]:
    """As `_write_tokens`; raises `InputError` if a file changes meanwhile."""
    advice = "while it was read; prepare again when nothing writes there"
    before = [entry.identity() for entry in entries]
    try:
        meta = _write_tokens(entries, data, tokenizer, directory)
        for entry, was in zip(entries, before, strict=True):
            if entry.identity() != was:
                raise InputError(f"data.paths: a file of {entry.spec} changed {advice}")
    except FileNotFoundError as error:
        raise InputError(f"data.paths: {error.filename} was removed {advice}") from None
    return meta


def _write_tokens(
    entries: tuple[Entry, ...], data: DataConfig, tokenizer: Tokenizer, directory: Path
) -> dict[str, Any]:
    """Writes train.bin and validation.bin; returns the fields of their `TokenFiles`."""
    started = time.monotonic()
    fraction = data.validation_fraction
    text_files = [file for entry in entries if entry.is_text() for file in entry.files]
    all_text = all(entry.is_text() for entry in entries)
    one_file = all_text and len(text_files) == 1
    skipped: Counter[str] = Counter()
    documents: Callable[[], Iterable[Document]]
    if one_file and 0 < fraction < 1:
        documents = functools.partial(split_file, text_files[0], fraction, data.bad_utf8)
    else:
        documents = functools.partial(read_documents, entries, data, skipped)
    size_known = all_text and data.max_documents == 0
    total = sum(entry.size() for entry in entries) if size_known else 0

    threshold = _threshold(documents(), fraction)
    skipped.clear()
    meta = _encode(documents(), threshold, tokenizer, directory, total)
    if meta["documents"] == 0:
        specs = ", ".join(entry.spec for entry in entries)
        rows = _say_skipped(skipped)
        column = ", or set data.column" if rows else ""
        raise InputError(f"data.paths: no text in {specs}{rows}; name others{column}")
    if one_file:
        meta["documents"] = 1  # its two parts count as one
    meta |= {"rows_without_text": skipped["all"], "rows_with_half": skipped["half"]}
    _say_summary(meta, max(time.monotonic() - started, 1e-3))
    return meta


def _threshold(documents: Iterable[Document], fraction: float) -> float:
    """`fraction`, or the nearest number such that the hashes of documents lie on both sides of it.

    Reads no further than to a document on either side.
    """
    if not 0 < fraction < 1:
        return fraction
    low, high = 1.0, 0.0
    for document in documents:
        if document.split:
            return fraction
        if next(document.pieces(), None) is None:  # no text: whichever side it is on stays empty
            continue
        found = _hash_fraction(document)
        low, high = min(low, found), max(high, found)
        if low < fraction <= high:
            return fraction
    if low < fraction:
        return high if low < high else 0.0  # trains on the highest, or on all if equal
    return math.nextafter(low, 1.0) if low < high else fraction


class _Piece(NamedTuple):
    """What one call of the tokenizer takes of a document."""

    part: Part  # without text at the end of the document
    split: str
    num_bytes: int


def _encode(
    documents: Iterable[Document],
    threshold: float,
    tokenizer: Tokenizer,
    directory: Path,
    total_bytes: int,
) -> dict[str, Any]:
    """Writes the tokens of `documents`; returns fields of `TokenFiles`.

    Args:
      documents: read once.
      threshold: documents without a split are held out if their hash is below it.
      tokenizer: encodes them.
      directory: train.bin and validation.bin are written there.
      total_bytes: size of the text, for the progress; 0 if unknown.
    """
    count: Counter[str] = Counter()

    def pieces() -> Iterator[_Piece]:
        for document in documents:
            split = document.split
            if not split and 0 < threshold < 1:
                split = "validation" if _hash_fraction(document) < threshold else "train"
            split = split or ("validation" if threshold else "train")
            part = None
            for part in parts(document.pieces(), tokenizer):
                yield _Piece(part, split, len(part.text.encode()))
            if part:
                yield _Piece(Part(""), split, 0)

    def sampled() -> Iterator[_Piece]:
        texts, size = [], 0
        for piece in pieces():
            yield piece
            texts.append(piece.part.text[:SAMPLE_LENGTH])
            size += piece.num_bytes + 64
            if size >= SAMPLED_BYTES:
                count.update(_try_round_trip(texts, tokenizer))
                texts, size = [], 0
        count.update(_try_round_trip(texts, tokenizer))

    def batches() -> Iterator[list[_Piece]]:
        batch, size = [], 0
        for piece in sampled():
            batch.append(piece)
            size += piece.num_bytes + 64  # 64: a million tiny rows take memory, too
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    digests = {split: hashlib.blake2b(digest_size=16) for split in ("train", "validation")}
    end = np.array([tokenizer.end_id], tokenizer.dtype)
    with (
        open(directory / "train.bin", "wb") as train,
        open(directory / "validation.bin", "wb") as validation,
        ThreadPoolExecutor(usable_cpus()) as encoding,  # while this thread reads and writes
        progress_bar(total_bytes, unit="B") as bar,
    ):
        files = {"train": train, "validation": validation}
        started = said = time.monotonic()
        written, read = itertools.tee(batches())
        parts_read = ([piece.part for piece in batch] for batch in read)
        encoded = Encoder(tokenizer, encoding).encode(parts_read)
        for batch, batch_ids in zip(written, encoded, strict=True):
            ids_of = {split: [end[:0]] for split in files}
            for piece, ids in zip(batch, batch_ids, strict=True):
                ids_of[piece.split].append(ids if piece.part.text else end)
                count["documents"] += not piece.part.text
                count["bad_utf8"] += piece.part.bad_utf8
                count[f"{piece.split}_bytes"] += piece.num_bytes
            for split, file in files.items():
                ids = np.concatenate(ids_of[split])
                file.write(ids.data)
                digests[split].update(ids.data)
                count["unknown_tokens"] += int(np.count_nonzero(ids == tokenizer.unknown_id))
                count[f"{split}_tokens"] += len(ids)
            bar.update(sum(piece.num_bytes for piece in batch))
            if bar.disable and (now := time.monotonic()) - said >= SECONDS_PER_LINE:
                said = now
                done = count["train_bytes"] + count["validation_bytes"]
                _say_progress(done, total_bytes, now - started)
    fields = ("train_tokens", "validation_tokens", "train_bytes", "validation_bytes", "documents")
    fields += ("bad_utf8", "unknown_tokens", "samples", "lossy_samples")
    meta: dict[str, Any] = {name: count[name] for name in fields}
    meta |= {"dtype": tokenizer.dtype.name, "vocab_size": tokenizer.vocab_size}
    content = (digests["train"].hexdigest(), digests["validation"].hexdigest())
    meta["fingerprint"] = digest(tokenizer.fingerprint, *content)
    return meta


def _hash_fraction(document: Document) -> float:
    """A number in [0, 1) that depends on the document's text and on nothing else."""
    digest = hashlib.blake2b(digest_size=8)
    for text, _ in document.pieces():
        digest.update(text.encode())
    return (int.from_bytes(digest.digest(), "big") >> 11) / 2**53


def _try_round_trip(texts: Sequence[str], tokenizer: Tokenizer) -> dict[str, int]:
    """How many of a few of the `texts` come back as another text when they are decoded.

    Without white space at their ends: many tokenizers put a space there, and drop one.
    """
    samples = [text for text in map(str.strip, texts) if text]
    samples = samples[:: -(-len(samples) // SAMPLES) or 1]
    lossy = [text for text in samples if tokenizer.decode(tokenizer.encode(text)).strip() != text]
    return {"samples": len(samples), "lossy_samples": len(lossy)}


def _say_if_lossy(files: TokenFiles, tokenizer: Tokenizer) -> None:
    if files.lossy_samples or files.unknown_tokens:
        unknown = files.unknown_tokens / (files.train_tokens + files.validation_tokens)
        say(
            f"WARNING: tokenizer {tokenizer.name} loses text: {unknown:.2%} of the tokens are "
            f"unknown, {files.lossy_samples} of {plural(files.samples, 'sample')} of the text do "
            "not come back when decoded; bits per byte does not count"
        )


def _say_progress(done: int, total: int, seconds: float) -> None:
    """Bytes of text done, of `total`, which is 0 if unknown."""
    rate = done / seconds
    line = f"data: {done / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s"
    if total > done:
        line += f", {duration((total - done) / rate)} left of {total / 1e6:,.0f} MB"
    say(line)


def _say_if_nothing_validates(validation_tokens: int, data: DataConfig) -> None:
    """Equal documents hash alike: a few of them may all fall on the side of training."""
    if validation_tokens == 0 and 0 < data.validation_fraction < 1:
        say(
            "WARNING: no text is left for validation, so there will be no validation loss: add "
            "documents that differ, or raise data.validation_fraction"
        )


def _say_summary(meta: dict[str, Any], seconds: float) -> None:
    tokens = meta["train_tokens"] + meta["validation_tokens"]
    num_bytes = meta["train_bytes"] + meta["validation_bytes"]
    bad = f", {meta['bad_utf8']:,} bad UTF-8 sequences replaced" if meta["bad_utf8"] else ""
    say(
        f"data: {plural(meta['documents'], 'document')}, {meta['train_tokens']:,} training + "
        f"{meta['validation_tokens']:,} validation tokens, {num_bytes:,} bytes, "
        f"{num_bytes / tokens:.2f} bytes per token, {tokens / seconds:,.0f} tokens/s{bad}"
        f"{_say_skipped(Counter(all=meta['rows_without_text'], half=meta['rows_with_half']))}"
    )


def _say_skipped(skipped: Counter[str]) -> str:
    """The rows that are no documents, for the line about a source; empty if there are none."""
    kinds = {"all": "without text", "half": "with half of it"}
    parts = [f"{skipped[kind]:,} {words}" for kind, words in kinds.items() if skipped[kind]]
    return f", skipped {plural(skipped.total(), 'row')}: {', '.join(parts)}" if parts else ""
