"""What an entry of `data.paths` means: the files it names, and their rows.

An entry is a file, a directory, a glob, `stdlib` or `hf:NAME`. Text files are read in
`documents.py`; jsonl, parquet and Hugging Face sources come as rows.
"""

import codecs
import glob
import gzip
import json
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from inl_jax.config import DataConfig, InputError
from inl_jax.console import first_line, plural, say

_ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_PACKED_SUFFIXES = (".gz", ".zip", ".zst", ".xz", ".bz2", ".7z", ".tar", ".arrow")
_TEXT_SUFFIXES = frozenset(
    ".txt .text .md .rst .tex .org .html .htm .xml .csv .tsv .json .yaml .yml .toml .ini .cfg .log "
    ".py .pyi .ipynb .c .h .cc .cpp .cxx .hpp .cu .java .kt .scala .js .jsx .ts .tsx .css .go .rs "
    ".rb .php .pl .sh .sql .r .jl .lua .swift .m .cs .fs .hs .ml .clj .ex .erl .el .lisp .f90 "
    ".asm .s .v .vhd .proto .cmake .srt .bib".split()
)
_STDLIB_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_TEXT_COLUMNS = (["content"], ["text"], ["code"], ["data"], ["prompt", "completion"])


class Entry(NamedTuple):
    """One entry of `data.paths` and the files it names, in the order in which they are read."""

    spec: str
    files: tuple[Path, ...]
    """An `hf:` entry reads none of these itself: they only tell its versions apart."""

    def identity(self) -> list[Any]:
        """The files' paths, sizes and times of change, and the name of an `hf:` entry: for JSON."""
        stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in self.files]
        return [self.spec if self.spec.startswith("hf:") else "", stats]

    def is_text(self) -> bool:
        """Whether every file is a text file: no rows and no `hf:` entry."""
        return not self.spec.startswith("hf:") and not any(map(is_rows, self.files))

    def size(self) -> int:
        """Bytes on disk; 0 for a dataset of the Hugging Face hub."""
        return sum(file.stat().st_size for file in self.files)


def find_entries(specs: Iterable[str]) -> tuple[Entry, ...]:
    """Finds the files of every entry.

    Raises:
      InputError: an entry names nothing, a packed file, or a file that another entry names too.
    """
    entries = tuple(map(_find, specs))
    entry_of: dict[Path, str] = {}
    for entry in entries:
        for file in {file.resolve() for file in entry.files}:
            # Each entry may split the file differently: validation text would be trained on.
            if file in entry_of:
                raise InputError(
                    f"data.paths: {file} is in both {entry_of[file]} and {entry.spec}; name it once"
                )
            entry_of[file] = entry.spec
    return entries


def _find(spec: str) -> Entry:
    if spec in ("", "hf:"):
        raise InputError(f"data.paths: an entry is {spec!r}; name a file, a directory or a dataset")
    if spec == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [file for file in _walk(root, _STDLIB_EXCLUDED) if file.suffix == ".py"]
        return Entry(spec, tuple(files))
    if spec.startswith("hf:"):
        local = os.path.expanduser(spec[3:]).partition("@")[0]
        return Entry(spec, tuple(_walk(Path(local))))  # no files if it is a dataset of the hub
    found = _matches(spec)
    files, skipped = [], Counter()
    for path in found:
        if path.is_file():
            files.append(path)
            continue
        for file in _walk(path):
            if is_rows(file) or file.suffix.lower() in _TEXT_SUFFIXES:
                files.append(file)
            else:
                skipped[file.suffix or "without suffix"] += 1
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in skipped.most_common(5))
    if not files:
        raise InputError(
            f"data.paths: {spec} holds no text, jsonl or parquet files "
            f"(skipped: {kinds or 'nothing'}); name other files by a glob such as {spec}/**/*"
        )
    if skipped:
        say(f"data: {spec}: skipped {plural(skipped.total(), 'file')} of other kinds ({kinds})")
    files = list(dict.fromkeys(files))  # a ** glob matches directories and also their files
    for file in files:
        if file.name.lower().endswith(_PACKED_SUFFIXES) and not is_rows(file):
            raise InputError(f"data.paths: {file} is packed; unpack it, or write .jsonl.gz")
    return Entry(spec, tuple(files))


def _matches(spec: str) -> list[Path]:
    """The file or directory that `spec` names, or all that match it as a glob; at least one."""
    try:
        path = Path(spec).expanduser()
        found = [path] if path.exists() else []
    except (OSError, RuntimeError) as error:  # a name too long, an unknown ~user
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
    return found


def _walk(root: Path, excluded: Iterable[str] = ()) -> Iterator[Path]:
    """The files under `root` in a fixed order, without hidden ones; follows no directory links."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in excluded and not f.startswith("."))
        files = (Path(folder, name) for name in sorted(names) if not name.startswith("."))
        yield from (file for file in files if file.exists())  # skips broken links


def is_rows(file: Path) -> bool:
    """Whether a file holds rows (.jsonl, .jsonl.gz, .parquet); any other file is one text."""
    return file.name.lower().endswith(_ROW_SUFFIXES)


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
