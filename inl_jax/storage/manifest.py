"""The manifest of a checkpoint: the size and the SHA-256 of each of its files.

Orbax has no checksum of array data: without a manifest, most flipped bits load as other weights.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from inl_jax.files import read_bytes, write_text

NAME = "manifest.json"


class Damaged(Exception):
    """A checkpoint is not as it was saved; the message names the file."""


def write_manifest(step_dir: Path) -> None:
    """Writes the manifest of a complete checkpoint.

    Raises:
      OSError: a file cannot be read, or the manifest cannot be written.
    """
    names = sorted(_names(step_dir))
    sizes = [(step_dir / name).stat().st_size for name in names]
    digests = _of_each(lambda name: _sha256(step_dir / name), names)
    files = {
        name: {"bytes": size, "sha256": digest}
        for name, size, digest in zip(names, sizes, digests, strict=True)
    }
    found = {"step": step_dir.name, "files": files}
    write_text(step_dir / NAME, json.dumps(found | {"sha256": _own(found)}, indent=1))


def has_manifest(step_dir: Path) -> bool:
    """Whether there is something to verify a checkpoint by."""
    return os.path.lexists(step_dir / NAME)


def holds(step_dir: Path, names: Iterable[str]) -> bool:
    """Whether a checkpoint has these files, as they were saved if it has a manifest."""
    try:
        saved = _read(step_dir) if has_manifest(step_dir) else {}
        return all(
            (step_dir / name).is_file()
            and (not saved or _sha256(step_dir / name) == saved[name]["sha256"])
            for name in names
        )
    except (Damaged, OSError, KeyError):
        return False


def verify(step_dir: Path, *, without: str = "", part: int = 0, parts: int = 1) -> str:
    """Compares a checkpoint with its manifest.

    Args:
      step_dir: the checkpoint.
      without: a folder in it that is not needed, and may be gone.
      part: of the files, which share to read here, from 0.
      parts: the number of shares.

    Returns:
      A remark, empty if all is as it was saved: there is no manifest (an older version saved the
      checkpoint, or a kill came between its commit and its manifest), or there are more files.

    Raises:
      Damaged: a file, or the manifest itself, is not as it was saved.
    """
    if not step_dir.is_dir():
        raise Damaged("it is gone, or no directory")
    if not has_manifest(step_dir):
        return "is not verified: it has no manifest"
    unneeded = f"{without}/" if without else "/"
    files = {n: saved for n, saved in _read(step_dir).items() if not n.startswith(unneeded)}
    names = {n for n in _names(step_dir) if not n.startswith(unneeded)}
    for name, saved in files.items():
        try:
            size = (step_dir / name).stat().st_size
        except OSError:
            raise Damaged(f"{name} is gone") from None
        if size != saved["bytes"] or name not in names:
            raise Damaged(f"{name} has {size} bytes, and {saved['bytes']} were saved")

    def check(name: str) -> None:
        try:
            same = _sha256(step_dir / name) == files[name]["sha256"]
        except OSError as error:
            raise Damaged(f"{name} cannot be read ({error.strerror})") from None
        if not same:
            raise Damaged(f"{name} does not hold the bytes that were saved")

    _of_each(check, sorted(files)[part::parts])
    more = sorted(names - files.keys())
    return (
        f"also holds {', '.join(map(repr, more[:3]))}, which training did not save" if more else ""
    )


def disappears(step_dir: Path) -> bool:
    """Whether a checkpoint is being deleted: its files grow fewer until it is gone."""
    left = None
    while (now := sum(1 for _ in step_dir.rglob("*"))) != left and step_dir.exists():
        left = now
        time.sleep(0.2)
    return not step_dir.exists()


def _read(step_dir: Path) -> dict[str, dict[str, Any]]:
    """The files of a manifest, which is checked against its own digest."""
    try:
        found = json.loads(read_bytes(step_dir / NAME))
        sound = found.pop("sha256") == _own(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise Damaged(f"its {NAME} is damaged; without that file it loads unverified")
    if found["step"] != step_dir.name:
        raise Damaged(f"it was saved as {found['step']}")
    return found["files"]


def _names(step_dir: Path) -> set[str]:
    """The files of a checkpoint but the manifest, relative to its directory."""
    return {
        Path(folder, name).relative_to(step_dir).as_posix()
        for folder, _, names in os.walk(step_dir)
        for name in names
    } - {NAME}


def _of_each(work: Callable[[str], Any], names: list[str]) -> list[Any]:
    """`work(name)` of each file, on some threads: hashing releases the GIL."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(work, names))


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _own(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
