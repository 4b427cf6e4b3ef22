"""The rows of jsonl, json, csv, parquet and arrow files, one at a time."""

import codecs
import contextlib
import csv
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from inl_jax.config import DataConfig, InputError
from inl_jax.console import first_line, size
from inl_jax.text.columns import usable_columns
from inl_jax.text.sniff import Kind, unpacked

MAX_ROW = 2**26
"""Bytes of the longest row of jsonl, json or csv. Reading one takes up to ten times as much."""
_CHUNK = 2**18  # bytes per read of a JSON array
_BATCH = 64  # rows of parquet and arrow files that become Python objects at a time

Rows = Iterator[tuple[dict[str, Any], str, int]]
"""Rows as (value by column, where the row stands, number of invalid UTF-8 sequences replaced)."""


def file_rows(file: Path, kind: Kind, data: DataConfig) -> Rows:
    """The rows of a file.

    Args:
      file: the file.
      kind: what `sniff` found it to be: any format but text.
      data: says which columns matter and what bytes that are not UTF-8 become.

    Raises:
      InputError: the file is damaged, a row is longer than MAX_ROW, or a package is missing.
    """
    if kind.format in ("parquet", "arrow"):
        yield from (_parquet_rows if kind.format == "parquet" else _arrow_rows)(file, data)
        return
    read = {"jsonl": _jsonl_rows, "json": _json_rows, "csv": _csv_rows}[kind.format]
    with unpacked(file, kind.packing) as stream:
        yield from read(file, stream, data)


def decoded_row(
    pairs: list[tuple[str, Any]], where: str, bad_utf8: str
) -> tuple[dict[str, Any], str, int]:
    """A row of (column, value) pairs whose values of bytes are text."""
    bad = 0
    for i, (name, value) in enumerate(pairs):
        if isinstance(value, bytes):
            text, _, more_bad = decode(value, True, bad_utf8, f"{where}, {name}", 0)
            pairs[i] = name, text
            bad += more_bad
    return _row(pairs), where, bad


def _row(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs by name; a name that stands twice has the tuple of its values, which is no text."""
    row = dict(pairs)
    if len(row) < len(pairs):
        values: dict[str, list[Any]] = {name: [] for name in row}
        for name, value in pairs:
            values[name].append(value)
        row = {name: tuple(found) if found[1:] else found[0] for name, found in values.items()}
    return row


_JSON = json.JSONDecoder(object_pairs_hook=_row)


def _lines(file: Path, stream: BinaryIO, bad_utf8: str) -> Iterator[tuple[str, int]]:
    """The lines of a file, without a byte order mark, each with its invalid sequences."""
    position = 0
    for number in itertools.count(1):
        line = stream.readline(MAX_ROW + 1)
        if not line:
            return
        if len(line) > MAX_ROW:
            raise InputError(
                f"{file} line {number}: longer than {size(MAX_ROW)}, the most of one row; split "
                "it, or write its text to a .txt file, which may be of any length"
            )
        text, _, bad = decode(line, True, bad_utf8, file, position)
        position += len(line)
        yield text.removeprefix("\ufeff") if number == 1 else text, bad


def _jsonl_rows(file: Path, stream: BinaryIO, data: DataConfig) -> Rows:
    for number, (line, bad) in enumerate(_lines(file, stream, data.bad_utf8), 1):
        where, line = f"{file} line {number}", line.strip()
        if not line:
            continue
        if number == 1 and line.startswith("["):
            raise InputError(f"{file}: a JSON array, not a row a line; name it .json")
        try:
            row = _JSON.decode(line)
        except (ValueError, RecursionError) as error:  # also numbers of 5,000 digits, deep nesting
            raise InputError(
                f"{where}: invalid JSON ({_reason(error)}); mend or remove the line"
            ) from None
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise InputError(f"{where}: holds a {kind}; write one JSON object a line")
        yield row, where, bad


def _reason(error: Exception) -> str:
    return getattr(error, "msg", type(error).__name__)


def _json_rows(file: Path, stream: BinaryIO, data: DataConfig) -> Rows:
    """The objects of a JSON array."""
    text = _JsonText(file, stream, data.bad_utf8)
    if not text.next_is("["):
        raise InputError(f"{file}: not a JSON array; write an array of objects, one a row")
    for number in itertools.count(1):
        where = f"{file} row {number}"
        if number == 1 and text.next_is("]"):
            break
        yield text.read_object(where), where, text.count_bad()
        if text.next_is("]"):
            break
        if not text.next_is(","):
            raise InputError(f"{where}: no comma or ] after it; the file is damaged or cut short")
    if not text.at_end():
        raise InputError(f"{file}: goes on after the end of its JSON array; write one array")


class _JsonText:
    """The text of a JSON file, of which memory holds the object being read."""

    def __init__(self, file: Path, stream: BinaryIO, bad_utf8: str):
        self.file, self.stream, self.bad_utf8 = file, stream, bad_utf8
        self.text, self.at = "", 0
        self.held, self.position = b"", 0  # bytes of a character not yet complete
        self.bad = 0
        self.read_more()
        self.text = self.text.removeprefix("\ufeff")

    def read_more(self) -> bool:
        """Reads as much as is held, and at least a chunk; whether there was any."""
        self.text, self.at = self.text[self.at :], 0
        fresh = self.stream.read(max(_CHUNK, len(self.text)))
        held = self.held + fresh
        text, used, bad = decode(held, not fresh, self.bad_utf8, self.file, self.position)
        self.text += text
        self.held, self.position, self.bad = held[used:], self.position + used, self.bad + bad
        return bool(fresh)

    def at_end(self) -> bool:
        """Whether only white space is left."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()
            if self.at < len(self.text):
                return False
            if not self.read_more():
                return True

    def next_is(self, sign: str) -> bool:
        """Takes the next character if it is `sign`."""
        found = not self.at_end() and self.text[self.at] == sign
        self.at += found
        return found

    def count_bad(self) -> int:
        """The invalid sequences read since the last call."""
        bad, self.bad = self.bad, 0
        return bad

    def read_object(self, where: str) -> dict[str, Any]:
        """The next object."""
        if self.at_end() or self.text[self.at] != "{":
            raise InputError(f"{where}: not a JSON object; write an array of objects, one a row")
        while True:
            try:
                row, self.at = _JSON.raw_decode(self.text, self.at)
                return row
            except (ValueError, RecursionError) as error:  # or cut off at the end of what is held
                reason = _reason(error)
            if len(self.text) - self.at > MAX_ROW:
                raise InputError(
                    f"{where}: invalid JSON ({reason}), or longer than {size(MAX_ROW)}, the most "
                    "of one row; mend or split it"
                )
            if not self.read_more():
                raise InputError(f"{where}: invalid JSON ({reason}); mend or remove it")


_SPACE = re.compile(r"[ \t\r\n]*")


def _csv_rows(file: Path, stream: BinaryIO, data: DataConfig) -> Rows:
    """The rows of a table with a header, between commas, tabs, semicolons or bars."""
    bad = 0

    def lines() -> Iterator[str]:
        nonlocal bad
        for line, more_bad in _lines(file, stream, data.bad_utf8):
            bad += more_bad
            yield line

    def likeness(delimiter: str) -> tuple[bool, int]:
        names = _names(_next_record(csv.reader([first], delimiter=delimiter)) or [])
        return bool(usable_columns(names, data.column)), len(names)

    text, where, advice = lines(), f"{file} line 1", "end its lines with a line feed"
    first = next(text, "")
    try:
        delimiter = max(",\t;|", key=likeness)
        table = csv.reader(itertools.chain([first], text), delimiter=delimiter, strict=True)
        advice = f"quote fields that hold {delimiter!r}, line breaks or quotes; double the quotes"
        header: list[str] = []
        while (record := _next_record(table)) is not None:
            if not header:
                header = _names(record)
            elif record and len(record) != len(header):
                raise InputError(
                    f"{where}: {len(record)} fields, but the header has {len(header)}; {advice}"
                )
            elif record:
                yield _row(list(zip(header, record, strict=True))), where, bad
                bad = 0
            where = f"{file} line {table.line_num + 1}"
    except csv.Error as error:
        raise InputError(f"{where}: invalid CSV ({error}); {advice}") from None


def _names(header: list[str]) -> list[str]:
    """The names in a header as errors show them: with single spaces and none around them."""
    return [" ".join(name.split()) for name in header]


def _next_record(table: Iterator[list[str]]) -> list[str] | None:
    """The next record; the limit of a field belongs to the whole process, so it is put back."""
    limit = csv.field_size_limit(MAX_ROW)
    try:
        return next(table, None)
    finally:
        csv.field_size_limit(limit)


def _parquet_rows(file: Path, data: DataConfig) -> Rows:
    with _pyarrow(file, "parquet") as pa:
        from pyarrow import parquet

        with parquet.ParquetFile(file, page_checksum_verification=True) as table:
            columns = _columns(pa, table.schema_arrow, data.column)
            batches = table.iter_batches(batch_size=_BATCH, columns=columns)
            yield from _batch_rows(file, batches, data, pa)


def _arrow_rows(file: Path, data: DataConfig) -> Rows:
    """The rows of an arrow file, or of an arrow stream, as `datasets` writes it."""
    with _pyarrow(file, "arrow") as pa, pa.OSFile(str(file)) as source:
        if source.read(6) == b"ARROW1":
            table = pa.ipc.open_file(source)
            batches = map(table.get_batch, range(table.num_record_batches))
        else:
            source.seek(max(0, source.size() - 8))
            if source.read() != b"\xff\xff\xff\xff\0\0\0\0":  # pyarrow does not miss its end
                raise InputError(f"{file}: damaged, or cut short (no end); copy it again")
            source.seek(0)
            batches = table = pa.ipc.open_stream(source)
        columns = _columns(pa, table.schema, data.column) or table.schema.names
        chosen = [i for i, name in enumerate(table.schema.names) if name in columns]
        yield from _batch_rows(file, (batch.select(chosen) for batch in batches), data, pa)


@contextlib.contextmanager
def _pyarrow(file: Path, kind: str) -> Iterator[ModuleType]:
    """pyarrow; what it raises about a damaged file becomes an `InputError`."""
    try:
        import pyarrow as pa
    except ImportError:
        raise InputError(f"{file}: needs pyarrow; pip install 'inl_jax[data]'") from None
    try:
        yield pa
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(
            f"{file}: damaged, or not {kind} ({first_line(error)}); copy it again"
        ) from None


def _columns(pa: ModuleType, schema: Any, wanted: str) -> list[str] | None:
    """The columns to read; None, which is all, if no text is where it is looked for."""
    texts = "string large_string string_view binary large_binary binary_view fixed_size_binary"

    def is_text(kind: Any) -> bool:
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        return str(kind).partition("[")[0] in texts.split()

    return usable_columns((field.name for field in schema if is_text(field.type)), wanted) or None


def _batch_rows(file: Path, batches: Iterable[Any], data: DataConfig, pa: ModuleType) -> Rows:
    """The rows of record batches."""
    number = 0
    for batch in batches:
        names = batch.schema.names
        columns = [_as_bytes(array, pa) for array in batch.columns]
        for start in range(0, batch.num_rows, _BATCH):
            values = [column.slice(start, _BATCH).to_pylist() for column in columns]
            for row in zip(*values, strict=True):
                number += 1
                where = f"{file} row {number}"
                yield decoded_row(list(zip(names, row, strict=True)), where, data.bad_utf8)


def _as_bytes(array: Any, pa: ModuleType) -> Any:
    """Strings as bytes, whose UTF-8 may be invalid.

    A view looks at no value: those of a damaged file, which validate finds, would crash a cast.
    """
    if pa.types.is_dictionary(array.type):
        values = _as_bytes(array.dictionary, pa)
        array = pa.DictionaryArray.from_arrays(array.indices, values)
    elif pa.types.is_string(array.type):
        array = array.view(pa.binary())
    elif pa.types.is_large_string(array.type):
        array = array.view(pa.large_binary())
    elif pa.types.is_string_view(array.type):
        array = array.view(pa.binary_view())
    array.validate(full=True)
    return array


def decode(
    data: bytes, final: bool, bad_utf8: str, where: object, position: int
) -> tuple[str, int, int]:
    """Decodes UTF-8: (text, number of bytes used, number of invalid sequences replaced by U+FFFD).

    Args:
      data: the bytes.
      final: whether the text ends with `data`. If not, a character cut off at the end is not used.
      bad_utf8: as `data.bad_utf8`.
      where: the file or the place in it, for the error.
      position: offset of `data` in `where`, in bytes, for the error.

    Raises:
      InputError: an invalid sequence, if `bad_utf8` is "error".
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
