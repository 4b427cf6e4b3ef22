"""What an entry of `data.paths` means: the files it names.

An entry is a file, a directory, a glob, `stdlib` or `hf:NAME`. Text files are read in
`documents.py`, rows in `rows.py`.
"""

import glob
import os
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from inl_jax.config import InputError
from inl_jax.console import plural, say

_ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_PACKED_SUFFIXES = (".gz", ".zip", ".zst", ".xz", ".bz2", ".7z", ".tar", ".arrow")
_TEXT_SUFFIXES = frozenset(
    ".txt .text .md .rst .tex .org .html .htm .xml .csv .tsv .json .yaml .yml .toml .ini .cfg .log "
    ".py .pyi .ipynb .c .h .cc .cpp .cxx .hpp .cu .java .kt .scala .js .jsx .ts .tsx .css .go .rs "
    ".rb .php .pl .sh .sql .r .jl .lua .swift .m .cs .fs .hs .ml .clj .ex .erl .el .lisp .f90 "
    ".asm .s .v .vhd .proto .cmake .srt .bib".split()
)
_STDLIB_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Entry(NamedTuple):
    """One entry of `data.paths` and the files it names, in the order in which they are read."""

    spec: str
    files: tuple[Path, ...]
    """An `hf:` entry reads none of these itself: they only tell its versions apart."""

    def identity(self) -> list[Any]:
        """The files' paths, sizes and times of change, and the name of an `hf:` entry: for JSON.

        The ctime tells files apart whose mtime was kept, as cp -p, rsync -t and tar do.
        """
        stats = [(str(file.resolve()), file.stat()) for file in self.files]
        times = [(path, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path, s in stats]
        return [self.spec if self.spec.startswith("hf:") else "", times]

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
