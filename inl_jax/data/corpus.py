"""Text sources to fingerprinted token files: read in a stream, tokenised once, kept in a cache.

A document is a text file, or a row of a jsonl, parquet or Hugging Face source; the tokenizer's end
token follows each. Memory does not grow with the corpus: text travels in pieces of about CHUNK.
"""

import codecs
import contextlib
import functools
import glob
import gzip
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import socket
import sys
import sysconfig
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from inl_jax.config import DataConfig, InputError
from inl_jax.data import tokenizer as tokenizers
from inl_jax.data.tokenizer import Tokenizer

CHUNK = 2**18
"""Bytes read at once, and about the characters encoded at once. Small, so that every core of a
large machine finds a piece in each batch."""
BATCH_BYTES = 2**22
"""UTF-8 bytes per call of the tokenizer; it needs some 50 times as much memory meanwhile."""
BPE_SAMPLE_BYTES = 2**26
"""Text that a BPE is trained on, at most."""
STALE_SECONDS = 24 * 3600
"""A temporary directory of another machine is taken for dead after this long without a write."""

_FORMAT = 1  # part of every cache key: raise it when the tokens of the same text would change
_TEXT_COLUMNS = (["content"], ["text"], ["code"], ["data"], ["prompt", "completion"])
_ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_PACKED_SUFFIXES = (".gz", ".zip", ".zst", ".xz", ".bz2", ".7z", ".tar", ".arrow")
_TEXT_SUFFIXES = frozenset(
    ".txt .text .md .rst .tex .org .html .htm .xml .csv .tsv .json .yaml .yml .toml .ini .cfg .log "
    ".py .pyi .ipynb .c .h .cc .cpp .cxx .hpp .cu .java .kt .scala .js .jsx .ts .tsx .css .go .rs "
    ".rb .php .pl .sh .sql .r .jl .lua .swift .m .cs .fs .hs .ml .clj .ex .erl .el .lisp .f90 "
    ".asm .s .v .vhd .proto .cmake .srt .bib".split()
)
_STDLIB_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class TokenFiles:
    """The tokens of one source: `train.bin` and `validation.bin`, plain arrays of `dtype`.

    Token counts include the end tokens; byte counts are of UTF-8 text, and do not.
    """

    directory: Path
    train_tokens: int
    validation_tokens: int
    train_bytes: int
    validation_bytes: int
    documents: int
    bad_utf8: int
    """Invalid byte sequences that were replaced by U+FFFD."""
    dtype: str
    fingerprint: str
    """Digest of the tokens and the tokenizer: equal wherever the files came from."""

    def open(self, split: Literal["train", "validation"]) -> np.ndarray:
        """The tokens of a split, `[tokens]`, memory-mapped read-only (empty: a plain array)."""
        file = self.directory / f"{split}.bin"
        if file.stat().st_size == 0:  # cannot be mapped
            return np.empty(0, self.dtype)
        return np.memmap(file, self.dtype, mode="r")


@dataclass(frozen=True)
class Corpus:
    """What `prepare` made: one source per weight, in the order of `data.paths`."""

    tokenizer: Tokenizer
    sources: tuple[TokenFiles, ...]
    weights: tuple[float, ...]
    """As given; `(1.0,)` where all paths are one corpus."""
    fingerprint: str
    """Digest of the sources' tokens, without weights: the same data has the same anywhere."""


def prepare(
    data: DataConfig,
    *,
    tokenizer: Tokenizer | None = None,
    report: Callable[[str], None] = print,
) -> Corpus:
    """Tokenises what `data` names, or finds it in the cache.

    Documents are split by a hash of their text, whatever their order and neighbours; where that
    leaves a side empty, the one document nearest to it is moved there. A source that is a single
    text file is split by position, at a line break. One distinct row alone is not split.

    Args:
      data: the sources, the tokenizer, the split and the cache.
      tokenizer: used in place of `data.tokenizer`.
      report: called with each line of progress.

    Raises:
      InputError: a source that is missing, empty or damaged, or a tokenizer that cannot be had.
      OSError: from the disk. Nothing that looks finished is left behind, then or ever.
    """
    entries = tuple(_find(spec, report) for spec in data.paths)
    _check_no_file_twice(entries)
    cache = make_cache(data.cache_dir)
    _remove_stale(cache)
    if tokenizer is None:
        if data.tokenizer.startswith("bpe:"):
            tokenizer = _trained_bpe(entries, data, cache, report)
        else:
            tokenizer = tokenizers.load_tokenizer(data.tokenizer)
    groups = tuple((entry,) for entry in entries) if data.weights else (entries,)
    sources = tuple(_prepare_source(group, data, tokenizer, cache, report) for group in groups)
    return Corpus(
        tokenizer, sources, data.weights or (1.0,), _digest(*[s.fingerprint for s in sources])
    )


def make_cache(cache_dir: str) -> Path:
    """The directory of `data.cache_dir`, made where it is missing; `InputError` where it cannot."""
    try:
        if not cache_dir:
            raise OSError(0, "it is empty")
        cache = Path(cache_dir).expanduser()
        cache.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: ~nobody
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"data.cache_dir={cache_dir!r}: {reason}; name a directory") from None
    return cache


# --- Sources: what an entry of data.paths stands for -------------------------------------------


class _Entry(NamedTuple):
    spec: str
    files: tuple[Path, ...]  # of an "hf:" entry: only what tells one version from another

    def identity(self) -> list[Any]:
        stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in self.files]
        return [self.spec if self.spec.startswith("hf:") else "", stats]

    def is_text(self) -> bool:
        return not self.spec.startswith("hf:") and not any(map(_is_rows, self.files))

    def size(self) -> int:
        return sum(file.stat().st_size for file in self.files)


def _check_no_file_twice(entries: Iterable[_Entry]) -> None:
    """A file in two entries could be split differently in each: training on validation text."""
    seen: dict[Path, str] = {}
    for entry in entries:
        for file in {file.resolve() for file in entry.files}:
            if file in seen:
                raise InputError(
                    f"data.paths: {file} is in both {seen[file]} and {entry.spec}; name it once"
                )
            seen[file] = entry.spec


def _is_rows(file: Path) -> bool:
    return file.name.lower().endswith(_ROW_SUFFIXES)


def _find(spec: str, report: Callable[[str], None]) -> _Entry:
    if spec in ("", "hf:"):
        raise InputError(f"data.paths: an entry is {spec!r}; name a file, a directory or a dataset")
    if spec == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [file for file in _walk(root, _STDLIB_EXCLUDED) if file.suffix == ".py"]
        return _Entry(spec, tuple(files))
    if spec.startswith("hf:"):
        local = os.path.expanduser(spec[3:]).partition("@")[0]
        return _Entry(spec, tuple(_walk(Path(local))))  # none where it is not a local path
    try:
        path = Path(spec).expanduser()
        found = [path] if path.exists() else []
    except (OSError, RuntimeError) as error:  # a name too long, ~nobody
        raise InputError(f"data.paths: {spec[:80]}: {error}; name a file or directory") from None
    if not found and any(c in spec for c in "*?["):
        found = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        if not found:
            raise InputError(f"data.paths: no file matches {spec}; quote globs in the shell")
    if not found:
        raise InputError(
            f"data.paths: no such file or directory: {spec}; "
            "for a Hugging Face dataset write hf:owner/name"
        )
    files, skipped = [], Counter()
    for path in found:
        if path.is_file():
            files.append(path)
            continue
        for file in _walk(path):
            if _is_rows(file) or file.suffix.lower() in _TEXT_SUFFIXES:
                files.append(file)
            else:
                skipped[file.suffix or "without suffix"] += 1
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in skipped.most_common(5))
    if not files:
        raise InputError(
            f"data.paths: {spec} holds no text, jsonl or parquet files "
            f"(skipped: {kinds or 'nothing'}); name others by a glob such as {spec}/**/*"
        )
    if skipped:
        report(f"data: {spec}: skipped {sum(skipped.values())} files of other kinds ({kinds})")
    files = list(dict.fromkeys(files))  # a ** glob gives directories and the files in them
    for file in files:
        if file.name.lower().endswith(_PACKED_SUFFIXES) and not _is_rows(file):
            raise InputError(f"data.paths: {file} is packed; unpack it, or write .jsonl.gz")
    return _Entry(spec, tuple(files))


def _walk(root: Path, excluded: Iterable[str] = ()) -> Iterator[Path]:
    """The files under `root` in one fixed order; no hidden ones, no links to directories."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in excluded and not f.startswith("."))
        files = (Path(folder, name) for name in sorted(names) if not name.startswith("."))
        yield from (file for file in files if file.exists())  # no broken links


# --- Documents ---------------------------------------------------------------------------------


class _Document(NamedTuple):
    pieces: Callable[[], Iterator[tuple[str, int]]]  # (text, bad byte sequences in it), repeatable
    split: str = ""  # train or validation where it is not left to the hash


def _documents(entries: Iterable[_Entry], data: DataConfig) -> Iterator[_Document]:
    for entry in entries:
        yield from itertools.islice(_entry_documents(entry, data), data.max_documents or None)


def _entry_documents(entry: _Entry, data: DataConfig) -> Iterator[_Document]:
    if entry.spec.startswith("hf:"):
        yield from _rows_as_documents(_hf_rows(entry.spec, data), data)
        return
    for file in entry.files:
        if _is_rows(file):
            rows = _parquet_rows if file.suffix.lower() == ".parquet" else _jsonl_rows
            yield from _rows_as_documents(rows(file, data), data)
            continue
        size = file.stat().st_size
        pieces = functools.partial(_read_span, file, 0, size, data.bad_utf8)
        if size <= CHUNK:  # hash and encode it from one reading
            pieces = functools.partial(list, list(pieces()))
        if size:
            yield _Document(pieces)


def _read_span(file: Path, start: int, end: int, bad_utf8: str) -> Iterator[tuple[str, int]]:
    """Bytes `start:end` of a file as pieces of text. Line ends stay as they are, a BOM goes."""

    def texts() -> Iterator[tuple[str, int]]:
        with open(file, "rb") as handle:
            handle.seek(start)
            if start == 0 and handle.read(3) != codecs.BOM_UTF8:
                handle.seek(0)
            position, data = handle.tell(), b""  # data: read but not decoded, ends at position
            while position < end and (fresh := handle.read(min(CHUNK, end - position))):
                data += fresh
                position += len(fresh)
                final = position >= end
                text, used, bad = _decode(data, final, bad_utf8, file, position - len(data))
                data = data[used:]
                yield text, bad

    return _pieces(texts())


def _decode(
    data: bytes, final: bool, bad_utf8: str, where: object, position: int
) -> tuple[str, int, int]:
    """(text, bytes used, bad sequences) of `data`, which begins at byte `position` of `where`.

    Unless `final`, a character cut in two at the end waits.
    """
    try:
        return *codecs.utf_8_decode(data, "strict", final), 0
    except UnicodeDecodeError as error:
        if bad_utf8 == "error":
            raise InputError(
                f"{where}, byte {position + error.start}: not UTF-8 ({error.reason}); convert it, "
                "or set data.bad_utf8=replace"
            ) from None
        text, used = codecs.utf_8_decode(data, "replace", final)
        return text, used, text.count("\ufffd") - data[:used].count(b"\xef\xbf\xbd")


# A place where no pre-tokeniser token of GPT-2 crosses: each is (space?)(letters | digits | other)
# or white space, and the only look-ahead is from white space. Greedy: the last such place.
_SAFE_CUT = re.compile(r"(?s:.*)\S(?=[ \t\r\n])")


def _pieces(texts: Iterable[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """`texts` cut anew: at least CHUNK characters each, but for the last, and cut where safe."""
    held, bad = "", 0
    for text, more_bad in texts:
        held, bad = held + text, bad + more_bad
        if len(held) >= CHUNK:
            safe = _SAFE_CUT.match(held)
            cut = safe.end() if safe else len(held)
            yield held[:cut], bad
            held, bad = held[cut:], 0
    if held:
        yield held, bad


# Each kind of rows yields (column to value, where it is, bad byte sequences in it).
_Rows = Iterator[tuple[dict[str, Any], str, int]]


def _rows_as_documents(rows: _Rows, data: DataConfig) -> Iterator[_Document]:
    columns: list[str] = []
    for row, where, bad in rows:
        columns = columns or _text_columns(list(row), data.column, where)
        if not any(column in row for column in columns):
            raise InputError(
                f"{where}: no column {' or '.join(columns)}, which the rows before it have (this "
                f"one: {', '.join(row)}); give every row the same columns"
            )
        text = ""
        for column in columns:
            value = row.get(column)
            if isinstance(value, bytes):
                value, _, more_bad = _decode(value, True, data.bad_utf8, f"{where}, {column}", 0)
                bad += more_bad
            if not isinstance(value, str | None):
                raise InputError(
                    f"{where}: column {column} holds {type(value).__name__}, not text; name "
                    f"another by data.column (there are {', '.join(row)})"
                )
            text += value or ""
        text, lone = re.subn("[\ud800-\udfff]", "\ufffd", text)  # JSON can spell half a pair
        if lone and data.bad_utf8 == "error":
            raise InputError(f"{where}: half a surrogate pair; set data.bad_utf8=replace")
        if text:
            yield _Document(functools.partial(_row_pieces, text, bad + lone))


def _row_pieces(text: str, bad: int) -> Iterator[tuple[str, int]]:
    starts = range(0, len(text), CHUNK)
    return _pieces((text[i : i + CHUNK], 0 if i else bad) for i in starts)


def _text_columns(found: list[str], wanted: str, where: str) -> list[str]:
    """The columns whose values, joined, are the text."""
    if wanted in found:
        return [wanted]
    by_name = {name.lower(): name for name in found}
    choices = [[wanted.lower()]] if wanted else _TEXT_COLUMNS
    for choice in choices:
        if all(name in by_name for name in choice):
            return [by_name[name] for name in choice]
    missing = f"no column {wanted}" if wanted else "no text column"
    raise InputError(f"{where}: {missing}; set data.column to one of: {', '.join(found)}")


def _jsonl_rows(file: Path, data: DataConfig) -> _Rows:
    opener = gzip.open if file.suffix.lower() == ".gz" else open
    position = 0
    try:
        with opener(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{file} line {number}"
                text, _, bad = _decode(line, True, data.bad_utf8, file, position)
                position += len(line)
                text = text.removeprefix("\ufeff").strip() if number == 1 else text.strip()
                if not text:
                    continue
                row = json.loads(text)
                if not isinstance(row, dict):
                    raise InputError(f"{where}: {type(row).__name__}, where an object should be")
                yield row, where, bad
    except InputError:
        raise
    except (ValueError, RecursionError) as error:  # also numbers or nesting without end
        reason = getattr(error, "msg", type(error).__name__)
        raise InputError(f"{where}: invalid JSON ({reason}); mend or remove the line") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{file}: damaged gzip ({error}); copy or pack it again") from None


def _parquet_rows(file: Path, data: DataConfig) -> _Rows:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{file}: needs pyarrow; pip install 'inl_jax[data]'") from None
    try:
        with parquet.ParquetFile(file) as table:
            columns = _text_columns(table.schema_arrow.names, data.column, str(file))
            number = 0
            for batch in table.iter_batches(batch_size=64, columns=columns):
                values = []
                for array in batch.columns:  # as bytes, since a string column may hold bad UTF-8
                    if pa.types.is_string(array.type):
                        array = array.cast(pa.binary())
                    elif pa.types.is_large_string(array.type):
                        array = array.cast(pa.large_binary())
                    values.append(array.to_pylist())
                for row in zip(*values, strict=True):
                    number += 1
                    names = batch.schema.names
                    yield dict(zip(names, row, strict=True)), f"{file} row {number}", 0
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{file}: damaged, or not parquet ({_first_line(error)}); copy it again"
        ) from None


def _hf_rows(spec: str, data: DataConfig) -> _Rows:
    try:
        import datasets
    except ImportError:
        raise InputError(f"{spec}: needs datasets; pip install 'inl_jax[data]'") from None
    name, _, config = os.path.expanduser(spec[3:]).partition("@")
    if name.startswith(("/", ".")) and not Path(name).is_dir():
        raise InputError(f"data.paths: no such directory: {name} (of {spec})")
    try:
        if any(Path(name, mark).exists() for mark in ("dataset_dict.json", "state.json")):
            rows = datasets.load_from_disk(name)
            rows = rows[data.hf_split] if isinstance(rows, dict) else rows
        else:
            rows = datasets.load_dataset(name, config or None, split=data.hf_split, streaming=True)
        if rows.column_names:  # known before the first row: fetch no other columns
            rows = rows.select_columns(_text_columns(rows.column_names, data.column, spec))
        for number, row in enumerate(rows, 1):
            yield row, f"{spec} row {number}", 0
    except InputError:
        raise
    except Exception as error:  # each backend of datasets raises its own
        raise InputError(
            f"{spec}, split {data.hf_split}: {type(error).__name__}: {_first_line(error)}; check "
            "the name, data.hf_split and the network"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- Tokens ------------------------------------------------------------------------------------


def _trained_bpe(
    entries: tuple[_Entry, ...], data: DataConfig, cache: Path, report: Callable[[str], None]
) -> Tokenizer:
    """The BPE of all entries, trained at most once.

    It sees every n-th piece of about CHUNK characters of each entry (validation documents too),
    with n such that they span the entry, until the entry's share of BPE_SAMPLE_BYTES is full. The
    size of a dataset on the hub is not known: there it sees the beginning.
    """
    vocab_size = tokenizers.bpe_vocab_size(data.tokenizer)
    key = _digest("bpe", vocab_size, *_identity(entries, data))
    directory = cache / f"tokenizer-{key}"
    if (directory / tokenizers.FILE_NAME).is_file():
        return tokenizers.load(directory)
    share = BPE_SAMPLE_BYTES // len(entries)

    def sample() -> Iterator[str]:
        for entry in entries:
            stride, room = max(1, math.ceil(entry.size() / share)), share
            documents = _documents([entry], data)
            pieces = (text for document in documents for text, _ in document.pieces())
            for text in itertools.islice(pieces, 0, None, stride):
                yield text
                room -= len(text.encode())
                if room <= 0:
                    break

    started = time.monotonic()
    tokenizer = tokenizers.train_bpe(sample(), vocab_size)
    with _publishing(directory) as temporary:
        tokenizer.save(temporary)
    seconds = time.monotonic() - started
    report(f"data: trained {data.tokenizer} ({tokenizer.vocab_size} ids) in {seconds:.1f} s")
    return tokenizers.load(directory)


def _prepare_source(
    entries: tuple[_Entry, ...],
    data: DataConfig,
    tokenizer: Tokenizer,
    cache: Path,
    report: Callable[[str], None],
) -> TokenFiles:
    key = _digest(*_identity(entries, data), data.validation_fraction, tokenizer.fingerprint)
    directory = cache / key
    if done := _finished(directory):
        report(
            f"data: {done.train_tokens:,} + {done.validation_tokens:,} tokens from the cache, "
            f"{directory}"
        )
        return done
    with _publishing(directory) as temporary:
        tokenizer.save(temporary)
        meta = _write_tokens(entries, data, tokenizer, temporary, report)
        (temporary / "meta.json").write_text(json.dumps(meta, indent=2))
    done = _finished(directory)
    assert done is not None
    return done


def _write_tokens(
    entries: tuple[_Entry, ...],
    data: DataConfig,
    tokenizer: Tokenizer,
    directory: Path,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Writes train.bin and validation.bin; returns the fields of their `TokenFiles`."""
    fraction = data.validation_fraction
    documents: Callable[[], Iterable[_Document]] = lambda: _documents(entries, data)  # noqa: E731
    one_file = all(e.is_text() for e in entries) and sum(len(e.files) for e in entries) == 1
    if one_file and 0 < fraction < 1:
        (file,) = (file for entry in entries for file in entry.files)
        documents = functools.partial(_halves, file, fraction, data.bad_utf8)
    known = all(entry.is_text() for entry in entries) and data.max_documents == 0
    progress = _Progress(sum(entry.size() for entry in entries) if known else 0, report)

    meta, hashes = _encode(documents(), fraction, tokenizer, directory, progress)
    if meta["documents"] == 0:
        specs = ", ".join(entry.spec for entry in entries)
        raise InputError(f"data.paths: no text in {specs}; name sources that hold some")
    if hashes and 0 < fraction < 1:
        low, high = hashes
        held_out = None
        if meta["train_tokens"] == 0:
            held_out = high if low < high else 0.0  # below the highest; a lone document trains
        elif meta["validation_tokens"] == 0 and low < high:
            held_out = math.nextafter(low, 1.0)
        if held_out is not None:  # only a few documents, so that a second reading is cheap
            meta, _ = _encode(documents(), held_out, tokenizer, directory, progress)
    if one_file:
        meta["documents"] = 1
    progress.finish(meta)
    return meta


def _halves(file: Path, fraction: float, bad_utf8: str) -> Iterator[_Document]:
    """One text file as a train and a validation document, cut near `1 - fraction` of its bytes."""
    size = file.stat().st_size
    middle = int(size * (1 - fraction))
    start = max(0, middle - CHUNK)
    with open(file, "rb") as handle:
        handle.seek(start)
        window = handle.read(2 * CHUNK)
    after = start + window.find(b"\n", middle - start) + 1
    before = start + window.rfind(b"\n", 0, middle - start) + 1
    if start < after < size:
        cut = after
    elif start < before:
        cut = before
    else:  # one long line: between two characters
        cut = middle
        while cut < min(size, middle + 3) and window[cut - start] & 0xC0 == 0x80:
            cut += 1
    for split, span in (("train", (0, cut)), ("validation", (cut, size))):
        yield _Document(functools.partial(_read_span, file, *span, bad_utf8), split)


def _hash_fraction(document: _Document) -> float:
    """A number in [0, 1) that only the document's text decides."""
    digest = hashlib.blake2b(digest_size=8)
    for text, _ in document.pieces():
        digest.update(text.encode())
    return (int.from_bytes(digest.digest(), "big") >> 11) / 2**53


class _Piece(NamedTuple):
    text: str  # empty: the document ends
    split: str
    num_bytes: int
    bad: int


def _encode(
    documents: Iterable[_Document],
    held_out: float,
    tokenizer: Tokenizer,
    directory: Path,
    progress: "_Progress",
) -> tuple[dict[str, Any], tuple[float, float] | None]:
    """Tokenises `documents`; those whose hash is below `held_out` are for validation.

    Returns:
      the fields of `TokenFiles`, and the lowest and highest hash if there were any.
    """
    hashes: list[float] = []

    def pieces() -> Iterator[_Piece]:
        for document in documents:
            split = document.split
            if not split and 0 < held_out < 1:
                fraction = _hash_fraction(document)
                hashes[:] = [min([fraction, *hashes]), max([fraction, *hashes])]
                split = "validation" if fraction < held_out else "train"
            split = split or ("validation" if held_out else "train")
            text = ""
            for text, bad in document.pieces():
                yield _Piece(text, split, len(text.encode()), bad)
            if text:
                yield _Piece("", split, 0, 0)

    def batches() -> Iterator[list[_Piece]]:
        batch, size = [], 0
        for piece in pieces():
            batch.append(piece)
            size += piece.num_bytes + 64  # 64: a million empty rows are no small batch either
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    count: Counter[str] = Counter()
    digests = {split: hashlib.blake2b(digest_size=16) for split in ("train", "validation")}
    end = np.array([tokenizer.end_id], tokenizer.dtype)
    with (
        open(directory / "train.bin", "wb") as train,
        open(directory / "validation.bin", "wb") as validation,
        ThreadPoolExecutor(1) as reader,  # reads one batch ahead while this one is encoded
    ):
        files = {"train": train, "validation": validation}
        stream = batches()
        ahead = reader.submit(next, stream, None)
        while batch := ahead.result():
            ahead = reader.submit(next, stream, None)
            encoded = tokenizer.encode_batch([piece.text for piece in batch])
            for piece, ids in zip(batch, encoded, strict=True):
                ids = ids if piece.text else end
                files[piece.split].write(ids.data)
                digests[piece.split].update(ids.data)
                count["documents"] += not piece.text
                count["bad_utf8"] += piece.bad
                count[f"{piece.split}_tokens"] += len(ids)
                count[f"{piece.split}_bytes"] += piece.num_bytes
            progress.show(count)
    fields = ("train_tokens", "validation_tokens", "train_bytes", "validation_bytes", "documents")
    meta: dict[str, Any] = {name: count[name] for name in (*fields, "bad_utf8")}
    meta["dtype"] = tokenizer.dtype.name
    content = (digests["train"].hexdigest(), digests["validation"].hexdigest())
    meta["fingerprint"] = _digest(tokenizer.fingerprint, *content)
    return meta, (hashes[0], hashes[1]) if hashes else None


class _Progress:
    """One line rewritten in place on a terminal, elsewhere a line every ten seconds."""

    def __init__(self, total_bytes: int, report: Callable[[str], None]):
        self._total, self._report = total_bytes, report  # total 0: not known
        self._started = self._shown = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def show(self, count: Counter[str]) -> None:
        now = time.monotonic()
        if now - self._shown < (0.2 if self._terminal else 10):
            return
        self._shown = now
        done = count["train_bytes"] + count["validation_bytes"]
        rate = done / (now - self._started)
        line = f"data: {done / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s"
        if self._total > done:
            line += f", {(self._total - done) / rate:,.0f} s left of {self._total / 1e6:,.0f} MB"
        if self._terminal:
            print(f"\r{line:<79}", end="", file=sys.stderr, flush=True)
        else:
            self._report(line)

    def finish(self, meta: dict[str, Any]) -> None:
        if self._terminal:
            print(f"\r{'':<79}\r", end="", file=sys.stderr, flush=True)
        tokens = meta["train_tokens"] + meta["validation_tokens"]
        size = meta["train_bytes"] + meta["validation_bytes"]
        seconds = max(time.monotonic() - self._started, 1e-3)
        line = (
            f"data: {meta['documents']:,} documents, {meta['train_tokens']:,} + "
            f"{meta['validation_tokens']:,} tokens, {size:,} bytes, {size / tokens:.2f} bytes per "
            f"token, {tokens / seconds:,.0f} tokens/s"
        )
        bad = f", {meta['bad_utf8']:,} bad UTF-8 sequences replaced" if meta["bad_utf8"] else ""
        self._report(line + bad)


# --- Cache -------------------------------------------------------------------------------------


def _digest(*parts: Any) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _identity(entries: tuple[_Entry, ...], data: DataConfig) -> list[Any]:
    """All that decides which documents are read."""
    settings = (data.column, data.hf_split, data.max_documents, data.bad_utf8)
    return [_FORMAT, [entry.identity() for entry in entries], *settings]


def _finished(directory: Path) -> TokenFiles | None:
    """The tokens in `directory`. What a power cut left short is removed."""
    if not directory.is_dir():
        return None
    try:
        done = TokenFiles(directory, **json.loads((directory / "meta.json").read_text()))
        if len(done.open("train")) == done.train_tokens:
            if len(done.open("validation")) == done.validation_tokens:
                return done
    except (ValueError, TypeError, OSError):
        pass
    shutil.rmtree(directory)
    return None


@contextlib.contextmanager
def _publishing(directory: Path) -> Iterator[Path]:
    """A temporary directory that becomes `directory` as a whole if the block ends well."""
    mark = f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    temporary = directory.with_name(f"tmp.{mark}")
    temporary.mkdir()
    try:
        yield temporary
        try:
            os.replace(temporary, directory)
        except OSError:
            if not directory.is_dir():  # else another process was first: what it made is as good
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_stale(cache: Path) -> None:
    """Removes the temporary directories of writers that died."""
    for temporary in cache.glob("tmp.*"):
        mark = temporary.name.removeprefix("tmp.").rsplit(".", 2)
        if len(mark) < 3 or not mark[1].isdecimal():
            continue  # not ours
        host, pid, _ = mark
        with contextlib.suppress(OSError):  # it was published or removed meanwhile
            if host == socket.gethostname():
                dead = not _alive(int(pid))
            else:
                newest = max(file.stat().st_mtime for file in (temporary, *temporary.iterdir()))
                dead = time.time() - newest > STALE_SECONDS
            if dead:
                shutil.rmtree(temporary, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
