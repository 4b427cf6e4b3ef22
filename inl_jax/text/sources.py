"""What an entry of `data.paths` means: the files it names.

An entry is a file, a directory, a glob, `stdlib` or `hf:NAME`. What to read in a directory is
decided in `folders.py`, what a file holds in `sniff.py`.
"""

import glob
import os
import stat
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from inl_jax.config import DataConfig, InputError
from inl_jax.console import plural, say
from inl_jax.text.folders import text_files, walk
from inl_jax.text.hub import parse
from inl_jax.text.places import local_path, mode_of, special_kind
from inl_jax.text.sniff import Kind, sniff
from inl_jax.text.splits import other_splits

_STDLIB_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Entry(NamedTuple):
    """One entry of `data.paths` and the files it names, in the order in which they are read."""

    spec: str
    files: tuple[Path, ...]
    """Each once, even if it has two names. An `hf:` entry reads none of these itself: they only
    tell its versions apart."""
    kinds: tuple[Kind, ...]
    """How to read each file; empty for an `hf:` entry."""

    def identity(self) -> list[Any]:
        """What tells this entry's text from another's, for JSON.

        The ctime tells files apart whose mtime was kept, as cp -p, rsync -t and tar do.
        """
        stats = [(str(file.resolve()), file.stat()) for file in self.files]
        times = [(path, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path, s in stats]
        return [self.spec if self.spec.startswith("hf:") else "", times, self.kinds]

    def is_text(self) -> bool:
        """Whether every file is a text file: no rows and no `hf:` entry."""
        return not self.spec.startswith("hf:") and all(k.format == "text" for k in self.kinds)

    def size(self) -> int:
        """Bytes on disk; 0 for a dataset of the Hugging Face hub."""
        return sum(file.stat().st_size for file in self.files)


def find_entries(specs: Iterable[str], data: DataConfig) -> tuple[Entry, ...]:
    """Finds the files of every entry. `data` says which split and which column are wanted.

    Raises:
      InputError: an entry names nothing, a file that cannot be read as text or records, or a file
        that another entry names, too.
    """
    entries = tuple(_find(spec, data) for spec in specs)
    entry_of: dict[tuple[int, int], int] = {}
    for index, entry in enumerate(entries):
        for file in entry.files:
            other = entry_of.setdefault(_inode(file), index)
            # Each entry may split the file differently: validation text would be trained on.
            if other != index:
                both = f"{entries[other].spec} and {entry.spec}"
                raise InputError(f"data.paths: {file} is in both {both}; name it once")
    return entries


def _find(spec: str, data: DataConfig) -> Entry:
    if spec in ("", "hf:"):
        raise InputError(f"data.paths: an entry is {spec!r}; name a file, a directory or a dataset")
    if spec == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        files = tuple(f for f in walk(root, _STDLIB_EXCLUDED) if f.suffix == ".py" and f.is_file())
        return Entry(spec, files, (Kind("text", ""),) * len(files))
    if spec.startswith("hf:"):
        root = Path(parse(spec).name)
        files = (file for file in walk(root) if file.is_file()) if root.is_dir() else ()
        return Entry(spec, tuple(files), ())
    found: dict[Path, Kind] = {}
    for path in _matches(spec):
        mode = mode_of(path)
        if mode is None:
            raise InputError(f"data.paths: {path} is a broken link; mend or remove it")
        if special := special_kind(mode):
            raise InputError(
                f"data.paths: {path} is {special}, not a regular file; write it to a file first"
            )
        found |= text_files(path, data) if stat.S_ISDIR(mode) else {path: sniff(path)}
    if "[" not in data.hf_split:
        others = other_splits(Path(os.path.commonpath(found)), found, data)
        if 0 < len(others) < len(found):  # as a glob may match them
            say(f"data: {spec} also names {plural(len(others), 'file')} of other splits")
    first = {_inode(file): file for file in reversed(found)}
    files = tuple(file for file in found if first[_inode(file)] == file)
    return Entry(spec, files, tuple(found[file] for file in files))


def _inode(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_dev, found.st_ino


def _matches(spec: str) -> list[Path]:
    """The file or directory that `spec` names, or all that match it as a glob; at least one."""
    path = local_path(spec)
    if mode_of(path) is not None:
        return [path]
    if not glob.has_magic(spec):
        advice = (
            "download it" if "://" in spec else "for a Hugging Face dataset write hf:owner/name"
        )
        raise InputError(f"data.paths: no such file or directory: {spec}; {advice}")
    base, rest = Path(path.anchor), path.relative_to(path.anchor)
    # A folder that exists may have brackets in its name: no pattern.
    while mode_of(base / rest.parts[0]) is not None:
        base, rest = base / rest.parts[0], Path(*rest.parts[1:])
    if "**" in rest.parts:
        list(walk(base))  # raises for a folder that may not be read, which `glob` passes over
    found = [base / match for match in glob.glob(str(rest), root_dir=base, recursive=True)]
    if not found:
        raise InputError(
            f"data.paths: no file matches {spec}; quote globs in the shell, and write [[] for a "
            "bracket that is no pattern"
        )
    held = {folder for match in found for folder in match.parents}  # as ** gives them
    return sorted(match for match in found if match not in held)
