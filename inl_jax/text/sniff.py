"""What a file holds: told by its first bytes, and by its name if these do not decide."""

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from inl_jax.checks import InputError
from inl_jax.console import first_line

Format = Literal["text", "jsonl", "json", "csv", "parquet", "arrow"]
Packing = Literal["", "gzip", "zstd", "xz", "bzip2"]

HEAD_BYTES = 2**16
"""Bytes at the beginning of a file, unpacked, that are looked at."""


class Kind(NamedTuple):
    """How to read a file."""

    format: Format
    """jsonl: a JSON object a line; json: one array of objects; csv: with commas, or .tsv with tabs;
    arrow: a file or a stream of record batches."""
    packing: Packing


class NotText(InputError):
    """A file that holds neither text nor records."""

    def __init__(self, message: str, found: str):
        """`found` names what it holds instead."""
        super().__init__(message)
        self.found = found


_PACKINGS: dict[str, Packing] = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2"}
_PACKING_MAGIC: dict[Packing, bytes] = {
    "gzip": rb"\x1f\x8b\x08",
    "zstd": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",  # a frame, or one to skip
    "xz": rb"\xfd7zXZ\0",
    "bzip2": rb"BZh[1-9](1AY&SY|\x17rE8P\x90)",
}
_TABLES = {".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow"}
_TABLE_MAGIC: dict[Format, bytes] = {
    "parquet": rb"PAR1(?=.*\0)",
    "arrow": rb"ARROW1\0|\xff{4}...[\0-\x7f]",  # a stream begins with a marker and a length
}
# Common formats, to be named. None of these bytes begins a text, but for the pointers.
_OTHER_MAGIC = {
    ("a pointer of Git LFS, not the data", "run: git lfs pull"): rb"version https://git-lfs",
    ("a pointer of git-annex, not the data", "run: git annex get"): rb"/annex/objects/",
    ("a tar archive", "unpack it"): rb".{257}ustar[\0 ]",
    ("an archive", "unpack it"): rb"PK(\x03\x04|\x05\x06)|7z\xbc\xaf\x27\x1c|Rar!\x1a\x07",
    ("packed by lz4 or compress", "unpack it"): rb"\x04\x22\x4d\x18|\x1f\x9d",
    ("a PDF or Office document", "extract its text"): rb"%PDF-|\xd0\xcf\x11\xe0",
    ("an image", "leave it out"): rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|II\*\0|MM\0\*|RIFF....WEBP",
    ("a NumPy array", "name text, not numbers"): rb"\x93NUMPY",
    ("safetensors", "name text, not weights"): rb".{5}\0{3}\{",
    ("a database or a pickle", "write its texts as .jsonl"): rb"SQLite format 3\0|\x80[\x02-\x05]",
    ("a program", "leave it out"): rb"\x7fELF|MZ.{1,60}\0",
}
_ENCODING_MAGIC = {
    "UTF-32": rb"\xff\xfe\0\0|\0\0\xfe\xff",
    "UTF-16": rb"\xff\xfe|\xfe\xff",
    "UTF-16LE": rb"([\t\n\r -~]\0){4}",
    "UTF-16BE": rb"(\0[\t\n\r -~]){4}",
    "ISO-2022-JP": rb"[^\x1b]*\x1b\$[@B]",
}
# All control characters but \b \t \n \v \f \r and escape.
_CONTROLS = bytes({*range(32), 127} - {*range(8, 14), 27})


def sniff(file: Path) -> Kind:
    """The kind of a regular file; of an empty one, by its name.

    Raises:
      NotText: it holds neither text nor records, or not what its name says.
      InputError: it cannot be read, its packing is damaged, or a package is missing.
    """
    suffix, named_packing = suffixes(file)
    with unpacked(file, "") as stream:
        head = stream.read(HEAD_BYTES)
    packing = _find(_PACKING_MAGIC, head) or ""
    if packing and suffix in (".tar", ".tgz", ".tbz2", ".txz"):
        raise _not_text(file, "a tar archive", "unpack it")
    if packing and packing != named_packing:
        longer = file.name + next(s for s, p in _PACKINGS.items() if p == packing)
        raise _not_text(file, f"packed by {packing}, unlike its name", f"name it {longer}")
    if packing:
        with unpacked(file, packing) as stream:
            head = stream.read(HEAD_BYTES)
    if other := _find(_OTHER_MAGIC, head):
        raise _not_text(file, *other)
    if named_packing and not packing and head:
        shorter = file.name[: file.name.rindex(".")]
        raise _not_text(file, f"holds no {named_packing}", f"copy it again, or name it {shorter}")
    table = _find(_TABLE_MAGIC, head)
    if packing and (table or _find(_PACKING_MAGIC, head)):
        raise _not_text(file, f"{table or 'a packed file'} packed by {packing}", "unpack it")
    if suffix in _TABLES and table != _TABLES[suffix]:
        raise _not_text(file, f"damaged, or not {_TABLES[suffix]}", "copy it again")
    return Kind(table or _text_format(file, head, suffix), packing)


def suffixes(file: Path) -> tuple[str, Packing]:
    """The suffix of a name in lower case, and the packing after it: .json and gzip of a.json.gz."""
    path = Path(file.name.lower())
    packing = _PACKINGS.get(path.suffix, "")
    return Path(path.stem).suffix if packing else path.suffix, packing


def _not_text(file: Path | str, found: str, advice: str) -> NotText:
    return NotText(f"{file}: {found}; {advice}", found)


def unpacked(file: Path, packing: Packing) -> io.BufferedReader:
    """Opens a file; its bytes are as they were before packing.

    Raises:
      InputError: it cannot be opened, or a package is missing. Reading raises it if the packing is
        damaged or cut short.
    """
    try:
        if not packing:
            return open(file, "rb")
        return io.BufferedReader(_Unpacked(_open(file, packing), file, packing))
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; name a file that you may read") from None


def _open(file: Path, packing: Packing) -> BinaryIO:
    if packing != "zstd":
        return {"gzip": gzip.open, "xz": lzma.open, "bzip2": bz2.open}[packing](file)
    try:
        import pyarrow as pa
    except ImportError:
        raise InputError(f"{file}: needs pyarrow; pip install 'inl_jax[data]'") from None
    return pa.CompressedInputStream(pa.OSFile(str(file)), "zstd")


class _Unpacked(io.RawIOBase):
    """A packed file. Each library has errors of its own; here they are `InputError`s."""

    def __init__(self, stream: BinaryIO, file: Path, packing: Packing):
        self._stream, self._file, self._packing = stream, file, packing

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            data = self._stream.read(len(buffer))
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise InputError(
                f"{self._file}: damaged {self._packing} ({first_line(error)}); copy it again, or "
                "unpack it"
            ) from None
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


def require_text(file: Path | str, invalid: int, length: int, most: float = 0.1) -> None:
    """Raises `NotText` if more than a part of a file's characters are invalid.

    Args:
      file: the file, for the error.
      invalid: number of its invalid UTF-8 sequences and control characters.
      length: number of its characters.
      most: the part that may be invalid.
    """
    if invalid > most * length:
        found = f"not UTF-8 text ({invalid:,} of {length:,} characters are invalid)"
        raise _not_text(file, found, "leave it out, or convert it to UTF-8, as by iconv")


def _text_format(file: Path, head: bytes, suffix: str) -> Format:
    if encoding := _find(_ENCODING_MAGIC, head):
        raise _not_text(file, f"text in {encoding}", f"convert it: iconv -f {encoding} -t UTF-8")
    if b"\0" in head:
        found = "binary data, or text in UTF-16 or UTF-32 (it has NUL bytes)"
        raise _not_text(file, found, "leave it out, or make it UTF-8 without NUL bytes")
    whole = len(head) < HEAD_BYTES
    text, used = codecs.utf_8_decode(head, "replace", whole)
    invalid = text.count("\ufffd") - head[:used].count("\ufffd".encode())
    controls = len(head) - len(head.translate(None, _CONTROLS))
    require_text(file, invalid + controls, len(text))

    text = text.removeprefix("\ufeff").lstrip()
    if suffix in (".jsonl", ".ndjson", ".json", ".csv", ".tsv") and text.startswith("<"):
        raise _not_text(file, "a web page, not rows", "download it again")
    if suffix == ".ipynb":
        raise _not_text(file, "a notebook", "convert it: jupyter nbconvert --to script")
    if suffix in (".jsonl", ".ndjson"):
        return "jsonl"
    if suffix in (".csv", ".tsv"):
        return "csv"
    if re.match(r"\[" if suffix == ".json" else r"\[\s*\{\s*\"", text):
        return "json"
    line, line_end, rest = text.partition("\n")
    closed = line.rstrip().endswith("}") or not (line_end or whole)
    if re.match(r"\{\s*\"", line) and closed and rest.lstrip()[:1] in ("", "{"):
        return "jsonl"
    if suffix == ".json" and text:
        raise _not_text(file, "JSON, but no rows", "write an object a line, or an array of objects")
    return "text"


def _find(patterns: dict[Any, bytes], head: bytes) -> Any:
    """The first key whose pattern matches the beginning of `head`, or None."""
    found = (key for key, pattern in patterns.items() if re.match(pattern, head, re.DOTALL))
    return next(found, None)
