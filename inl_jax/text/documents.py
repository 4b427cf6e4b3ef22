"""Rows and files to documents, and which documents are held out.

A document is a text file, or a row of a jsonl, parquet or Hugging Face source. Its text travels in
pieces of about PIECE_SIZE, so memory does not grow with the corpus.
"""

import codecs
import functools
import io
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from inl_jax.config import DataConfig
from inl_jax.text.columns import row_text, text_columns
from inl_jax.text.hub import hub_rows
from inl_jax.text.rows import Rows, decode, file_rows
from inl_jax.text.sniff import Packing, require_text, sniff, unpacked
from inl_jax.text.sources import Entry

PIECE_SIZE = 2**18
"""Bytes of one read, and the fewest characters of a piece but the last. Small, so that each batch
of the tokenizer has a piece for every core of a large machine."""

LOOK_ROWS = 100
"""Rows of a source that say which column is the text."""
LOOK_LENGTH = 2**20
"""Characters after which a look at these rows ends."""

Pieces = Iterator[tuple[str, int]]
"""Text in pieces, each with the number of invalid UTF-8 sequences replaced in it."""


class Document(NamedTuple):
    """One text."""

    pieces: Callable[[], Pieces]
    """Reads the text; may be called again."""
    split: str = ""
    """train or validation; empty if a hash of the text decides."""


def read_documents(
    entries: Iterable[Entry], data: DataConfig, skipped: Counter[str] | None = None
) -> Iterator[Document]:
    """The documents of all entries in order, at most `data.max_documents` of each.

    Args:
      entries: read one after another.
      data: columns, split, and what bytes that are not UTF-8 become.
      skipped: counts the rows that are no documents, by what is missing of the text: all or half.
    """
    skipped = Counter() if skipped is None else skipped
    for entry in entries:
        documents = _entry_documents(entry, data, skipped)
        yield from itertools.islice(documents, data.max_documents or None)


def _entry_documents(entry: Entry, data: DataConfig, skipped: Counter[str]) -> Iterator[Document]:
    if entry.spec.startswith("hf:"):
        yield from _row_documents(entry.spec, hub_rows(entry.spec, data), data, skipped)
        return
    for file, kind in zip(entry.files, entry.kinds, strict=True):
        if kind.format != "text":
            yield from _row_documents(file, file_rows(file, kind, data), data, skipped)
            continue
        size = file.stat().st_size
        end = None if kind.packing else size
        pieces = functools.partial(_read_text, file, kind.packing, 0, end, data.bad_utf8)
        if not kind.packing and size <= PIECE_SIZE:
            pieces = functools.partial(iter, list(pieces()))  # read once, to hash and to encode
        if size:
            yield Document(pieces)


def _read_text(file: Path, packing: Packing, start: int, end: int | None, bad_utf8: str) -> Pieces:
    """As `_read_span`; raises `NotText` at the end if most of the span was no text."""
    invalid = length = 0
    for text, bad in _read_span(file, packing, start, end, bad_utf8):
        invalid, length = invalid + bad + text.count("\0"), length + len(text)
        yield text, bad
    require_text(file, invalid, length)


def _read_span(file: Path, packing: Packing, start: int, end: int | None, bad_utf8: str) -> Pieces:
    """Bytes `start:end` of a file's text. Keeps line ends as they are, drops a byte order mark."""

    def texts() -> Pieces:
        with unpacked(file, packing) as stream:
            mark = start == 0 and stream.peek(3).startswith(codecs.BOM_UTF8)
            position = start + (3 if mark else 0)
            _skip(stream, position)
            data, final = b"", False  # data: bytes before position, not yet decoded
            while not final:
                fresh = stream.read(PIECE_SIZE if end is None else min(PIECE_SIZE, end - position))
                data += fresh
                position += len(fresh)
                final = not fresh or position == end
                text, used, bad = decode(data, final, bad_utf8, file, position - len(data))
                data = data[used:]
                yield text, bad

    return _pieces(texts())


# The last place that no token of GPT-2's pre-tokenizer crosses. Its tokens are (space?)(letters |
# digits | other) or white space, and only white space looks ahead. For other tokenizers, and where
# there is no such place, `tokens.long_documents` joins the pieces.
_SAFE_CUT = re.compile(r"(?s:.*)\S(?=[ \t\r\n])")


def _pieces(texts: Iterable[tuple[str, int]]) -> Pieces:
    """Joins `texts` and cuts them at places that no token spans; the last piece may be short."""
    held, bad = "", 0
    for text, more_bad in texts:
        held, bad = held + text, bad + more_bad
        if len(held) >= PIECE_SIZE:
            safe = _SAFE_CUT.match(held)
            cut = safe.end() if safe else len(held)
            yield held[:cut], bad
            held, bad = held[cut:], 0
    if held:
        yield held, bad


def _row_documents(
    source: Path | str, rows: Rows, data: DataConfig, skipped: Counter[str]
) -> Iterator[Document]:
    """Raises `NotText` at the end if most of the text was bytes of something else."""
    looked_at = _first_rows(rows)
    if not looked_at:
        return
    sample, where = [row for row, _, _ in looked_at], looked_at[0][1]
    columns = text_columns(sample, data.column, where)
    invalid = length = 0
    for row, where, bad in itertools.chain(looked_at, rows):
        text, missing, lone = row_text(row, columns, where, bad_utf8=data.bad_utf8)
        invalid += min(bad, text.count("\ufffd")) + text.count("\0")  # bad: of all columns
        length += len(text)
        if missing:
            skipped[missing] += 1
        else:
            yield Document(functools.partial(_cut_text, text, bad + lone))
    require_text(source, invalid, length, most=0.25)  # rows may be short


def _first_rows(rows: Rows) -> list[tuple[dict[str, Any], str, int]]:
    """The first LOOK_ROWS rows, or fewer if they are large."""
    first, length = [], 0
    for row in itertools.islice(rows, LOOK_ROWS):
        first.append(row)
        length += sum(len(value) for value in row[0].values() if isinstance(value, str))
        if length > LOOK_LENGTH:
            break
    return first


def _cut_text(text: str, bad: int) -> Pieces:
    starts = range(0, len(text), PIECE_SIZE)
    return _pieces((text[i : i + PIECE_SIZE], 0 if i else bad) for i in starts)


def split_file(file: Path, fraction: float, bad_utf8: str) -> Iterator[Document]:
    """One text file as a document to train on and one to validate on.

    The cut is a line break near `1 - fraction` of its bytes, or lies between two characters if no
    break is within PIECE_SIZE.
    """
    packing = sniff(file).packing
    size = _size(file, packing)
    middle = int(size * (1 - fraction))
    start = max(0, middle - PIECE_SIZE)
    with unpacked(file, packing) as stream:
        _skip(stream, start)
        window = stream.read(2 * PIECE_SIZE)
    after = start + window.find(b"\n", middle - start) + 1
    before = start + window.rfind(b"\n", 0, middle - start) + 1
    if start < after < size:
        cut = after
    elif start < before:
        cut = before
    else:  # one long line
        cut = middle
        while cut < min(size, middle + 3) and window[cut - start] & 0xC0 == 0x80:
            cut += 1
    for split, span in (("train", (0, cut)), ("validation", (cut, size))):
        yield Document(functools.partial(_read_text, file, packing, *span, bad_utf8), split)


def _size(file: Path, packing: Packing) -> int:
    """Bytes of a file's text; a packed one is read to its end."""
    if not packing:
        return file.stat().st_size
    with unpacked(file, packing) as stream:
        return sum(map(len, iter(lambda: stream.read(PIECE_SIZE), b"")))


def _skip(stream: io.BufferedReader, size: int) -> None:
    if stream.seekable():
        stream.seek(size)
        return
    while size > 0 and (data := stream.read(min(PIECE_SIZE, size))):
        size -= len(data)
