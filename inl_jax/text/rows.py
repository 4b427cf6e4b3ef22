"""The rows of jsonl, parquet and Hugging Face sources, and which of their columns are the text."""

import codecs
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inl_jax.config import DataConfig, InputError
from inl_jax.console import first_line

_TEXT_COLUMNS = (["content"], ["text"], ["code"], ["data"], ["prompt", "completion"])

Rows = Iterator[tuple[dict[str, Any], str, int]]
"""Rows as (value by column, where the row stands, number of invalid UTF-8 sequences replaced)."""


def file_rows(file: Path, data: DataConfig) -> Rows:
    """The rows of a jsonl or parquet file.

    Raises:
      InputError: the file is damaged, has no text column, or needs a package that is missing.
    """
    return (_parquet_rows if file.suffix.lower() == ".parquet" else _jsonl_rows)(file, data)


def _jsonl_rows(file: Path, data: DataConfig) -> Rows:
    opener = gzip.open if file.suffix.lower() == ".gz" else open
    position = 0
    try:
        with opener(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{file} line {number}"
                text, _, bad = decode(line, True, data.bad_utf8, file, position)
                position += len(line)
                text = text.removeprefix("\ufeff").strip() if number == 1 else text.strip()
                if not text:
                    continue
                row = json.loads(text)
                if not isinstance(row, dict):
                    raise InputError(
                        f"{where}: holds a {type(row).__name__}; write one JSON object a line"
                    )
                yield row, where, bad
    except InputError:
        raise
    except (ValueError, RecursionError) as error:  # also numbers of 5,000 digits, deep nesting
        reason = getattr(error, "msg", type(error).__name__)
        raise InputError(f"{where}: invalid JSON ({reason}); mend or remove the line") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{file}: damaged gzip ({error}); copy or pack it again") from None


def _parquet_rows(file: Path, data: DataConfig) -> Rows:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{file}: needs pyarrow; pip install 'inl_jax[data]'") from None
    try:
        with parquet.ParquetFile(file) as table:
            columns = text_columns(table.schema_arrow.names, data.column, str(file))
            number = 0
            for batch in table.iter_batches(batch_size=64, columns=columns):
                values = []
                for array in batch.columns:  # as bytes: a string column may hold invalid UTF-8
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
            f"{file}: damaged, or not parquet ({first_line(error)}); copy it again"
        ) from None


def hf_rows(spec: str, data: DataConfig) -> Rows:
    """The rows of `hf:NAME` or `hf:NAME@CONFIG`, a dataset of the Hugging Face hub or of the disk.

    Raises:
      InputError: the dataset or its split cannot be read, or the `datasets` package is missing.
    """
    try:
        import datasets
    except ImportError:
        raise InputError(f"{spec}: needs datasets; pip install 'inl_jax[data]'") from None
    name, _, config = os.path.expanduser(spec[3:]).partition("@")
    if name.startswith(("/", ".")) and not Path(name).is_dir():
        raise InputError(f"data.paths: no such directory: {name} (of {spec}); name one that exists")
    try:
        if any(Path(name, mark).exists() for mark in ("dataset_dict.json", "state.json")):
            rows = datasets.load_from_disk(name)
            rows = rows[data.hf_split] if isinstance(rows, dict) else rows
        else:
            rows = datasets.load_dataset(name, config or None, split=data.hf_split, streaming=True)
        if rows.column_names:  # known before the first row: fetch only the text
            rows = rows.select_columns(text_columns(rows.column_names, data.column, spec))
        for number, row in enumerate(rows, 1):
            yield row, f"{spec} row {number}", 0
    except InputError:
        raise
    except Exception as error:  # each backend of datasets raises exceptions of its own
        raise InputError(
            f"{spec}, split {data.hf_split}: {type(error).__name__}: {first_line(error)}; check "
            "the name, data.hf_split and the network"
        ) from error


def text_columns(names: list[str], wanted: str, where: str) -> list[str]:
    """The columns among `names` whose values, joined, are the text.

    Args:
      names: columns of a row.
      wanted: `data.column`; if empty, the usual names are tried.
      where: the file or row, for the error.

    Raises:
      InputError: there is no such column.
    """
    if wanted in names:
        return [wanted]
    by_lower_case = {name.lower(): name for name in names}
    for choice in [[wanted.lower()]] if wanted else _TEXT_COLUMNS:
        if all(name in by_lower_case for name in choice):
            return [by_lower_case[name] for name in choice]
    missing = f"no column {wanted}" if wanted else "no text column"
    raise InputError(f"{where}: {missing}; set data.column to one of: {', '.join(names)}")


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
