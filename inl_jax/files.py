"""Small files: a reader sees the old content or the new, and a power cut loses neither.

JSON is written and paths are taken from the user here alone, so that one rule holds for all.
"""

import contextlib
import errno
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from inl_jax.checks import InputError, require, shown

_LONGEST_NAME, _LONGEST_PATH = 255, 3800  # bytes; Linux takes 4,095, and runs write below theirs


def user_path(path: str | os.PathLike, name: str) -> Path:
    """A path that the user gave, with `~` expanded. Nothing is looked for on the disk.

    Args:
      path: as given.
      name: what the user calls it: a field, a flag.

    Raises:
      InputError: as `check_path`; or there is no such home directory.
    """
    check_path(path, name)
    expanded = os.path.expanduser(path)
    require(
        not expanded.startswith("~"),
        f"{name}={path}: no such home directory; write an absolute path, or ./{path} for that name",
    )
    check_path(expanded, name)
    return Path(expanded)


def check_path(path: str | os.PathLike, name: str) -> None:
    """Checks that a file may be called so.

    Raises:
      InputError: `path` is no text, or empty, has a NUL, is too long or not UTF-8.
    """
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    require(isinstance(text, str), f"{name}={shown(path)}: must be a path, such as 'runs/a'")
    require(text != "", f"{name} is empty: name a path")
    require("\0" not in text, f"{name}={text}: has a NUL character; remove it")
    try:
        whole = os.path.abspath(text).encode()
    except UnicodeEncodeError:
        raise InputError(f"{name}={text}: is not UTF-8; rename it") from None
    except OSError as error:
        raise InputError(
            f"{name}={text}: the working directory cannot be used ({error.strerror}); change to "
            "another"
        ) from None
    longest = max(map(len, whole.split(b"/")))
    require(
        longest <= _LONGEST_NAME and len(whole) <= _LONGEST_PATH,
        f"{name}={text}: is too long; a name has at most {_LONGEST_NAME} bytes, a path "
        f"{_LONGEST_PATH:,}",
    )


def write_text(path: Path, text: str) -> None:
    """Replaces a file, as UTF-8, and returns once it is on the disk.

    Raises:
      OSError: it cannot be written. The old content stays.
    """
    temporary = path.with_name(f".{path.name[:50]}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def remove_unfinished(directory: Path) -> None:
    """Removes what `write_text` leaves if it is killed. For the one process that writes there."""
    for path in directory.glob(".*.*"):
        if path.suffix[1:].isdecimal():
            path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Returns once the content of a file, or the names in a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def append_lines(path: Path, lines: str) -> None:
    """Appends whole lines to a file, all or none. A last line that was cut short is ended first.

    Raises:
      OSError: they cannot be written, or `path` is no regular file. A pipe never blocks.
    """
    handle = _open_regular(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    try:
        size = os.fstat(handle).st_size
        torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
        left = (b"\n" if torn else b"") + lines.encode()
        try:
            while left:
                left = left[os.write(handle, left) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(handle, size)
            raise
    finally:
        os.close(handle)


def read_bytes(path: Path) -> bytes:
    """The content of a file.

    Raises:
      OSError: it cannot be read, or is no regular file. A pipe never blocks.
    """
    with open(_open_regular(path, os.O_RDONLY), "rb") as file:
        return file.read()


def _open_regular(path: Path, flags: int) -> int:
    handle = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return handle


def json_text(value: Any, *, indent: int | None = None) -> str:
    """`value` as JSON, in ASCII. Numbers that are not finite, which JSON has not, become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> dict[str, Any]:
    """An object, empty if the file is missing or damaged."""
    try:
        found = json.loads(read_bytes(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
