"""Where prepared tokens are kept: one directory per corpus and tokenizer, named by a digest.

CACHE/KEY/            train.bin  validation.bin  meta.json  tokenizer.json
CACHE/tokenizer-KEY/  tokenizer.json: a BPE trained on a corpus
CACHE/tmp.HOST.PID.X  being written

A directory is renamed into place when it is complete, so any number of processes may share a cache.
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from inl_jax.config import DataConfig, InputError
from inl_jax.console import first_line
from inl_jax.text.sources import Entry

STALE_SECONDS = 24 * 3600
"""Another machine's temporary directory is removed if nothing was written to it for this long."""

_FORMAT = 2  # part of every key: raise it if the same text would give other tokens


@dataclass(frozen=True)
class TokenFiles:
    """The tokens of one source: `train.bin` and `validation.bin`, plain arrays of `dtype`.

    Token counts include the end tokens. Byte counts are bytes of UTF-8 text, without end tokens.
    """

    directory: Path
    train_tokens: int
    validation_tokens: int
    train_bytes: int
    validation_bytes: int
    documents: int
    bad_utf8: int
    """Invalid UTF-8 sequences that were replaced by U+FFFD."""
    rows_without_text: int
    rows_with_half: int
    """Rows that lack a part of their text; like those without, they are no documents."""
    dtype: str
    """uint16 or uint32."""
    fingerprint: str
    """Hex digest of the tokens and the tokenizer, whatever files the text came from."""

    def open(self, split: Literal["train", "validation"]) -> np.ndarray:
        """The tokens of a split, `[tokens]`, memory-mapped and read-only.

        Raises:
          OSError: the file cannot be read.
          ValueError: its length is not a whole number of tokens.
        """
        file = self.directory / f"{split}.bin"
        if file.stat().st_size == 0:  # an empty file cannot be mapped
            return np.empty(0, self.dtype)
        return np.memmap(file, self.dtype, mode="r")


def make_cache(cache_dir: str) -> Path:
    """The directory `data.cache_dir`, made if it is missing.

    Raises:
      InputError: it cannot be made.
    """
    try:
        if not cache_dir:
            raise OSError(0, "it is empty")
        cache = Path(cache_dir).expanduser()
        cache.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: an unknown ~user
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"data.cache_dir={cache_dir!r}: {reason}; name a directory") from None
    return cache


def digest(*parts: Any) -> str:
    """A digest of 32 hex digits of `parts`, which JSON can hold."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def identity(entries: tuple[Entry, ...], data: DataConfig) -> list[Any]:
    """Everything that decides which documents are read, for `digest`."""
    settings = (data.column, data.hf_split, data.max_documents, data.bad_utf8)
    return [_FORMAT, [entry.identity() for entry in entries], *settings]


def read_finished(directory: Path) -> TokenFiles | None:
    """The tokens in `directory`; None if there is none.

    A directory that is damaged, as by a power cut, is removed: meta.json is missing or no such
    record, or a token file is missing or has another length.

    Raises:
      InputError: the directory cannot be read for another reason, or is none. Nothing is removed.
    """
    if directory.is_file() or (directory.is_symlink() and not directory.exists()):
        raise InputError(f"{directory}: is no directory of prepared tokens; remove it")
    try:
        if not directory.is_dir():
            return None
        done = TokenFiles(directory, **json.loads((directory / "meta.json").read_text()))
        if len(done.open("train")) == done.train_tokens:
            if len(done.open("validation")) == done.validation_tokens:
                return done
    except (ValueError, TypeError, FileNotFoundError):
        pass
    except OSError as error:  # the disk or the network may recover, and hours of work are kept here
        raise InputError(
            f"{directory}: cannot read the tokens kept there ({first_line(error)}); make it "
            "readable, remove it, or name another data.cache_dir"
        ) from error
    remove(directory)
    return None


def remove(directory: Path) -> None:
    """Removes a damaged directory, though others may find it damaged at the same time."""
    aside = directory.with_name(_temporary_name())
    with contextlib.suppress(FileNotFoundError):  # another was first
        os.replace(directory, aside)
    shutil.rmtree(aside, ignore_errors=True)


def _temporary_name() -> str:
    return f"tmp.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"


@contextlib.contextmanager
def publishing(directory: Path) -> Iterator[Path]:
    """A temporary directory, renamed to `directory` at the end of the block, removed on errors."""
    temporary = directory.with_name(_temporary_name())
    temporary.mkdir()
    try:
        yield temporary
        try:
            os.replace(temporary, directory)
        except OSError:
            if not directory.is_dir():  # if it is, another process made the same one first
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_stale(cache: Path) -> None:
    """Removes temporary directories whose writers have died."""
    for temporary in cache.glob("tmp.*"):
        mark = temporary.name.removeprefix("tmp.").rsplit(".", 2)
        if len(mark) < 3 or not mark[1].isdecimal():
            continue  # not one of ours
        host, pid, _ = mark
        with contextlib.suppress(OSError):  # its writer renames or removes it at the same time
            if host == socket.gethostname():
                dead = not _is_alive(int(pid))
            else:
                newest = max(file.stat().st_mtime for file in (temporary, *temporary.iterdir()))
                dead = time.time() - newest > STALE_SECONDS
            if dead:
                shutil.rmtree(temporary, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, as another user
        pass
    return True
