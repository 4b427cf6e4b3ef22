"""Where prepared tokens are kept: one directory per corpus and tokenizer, named by a digest.

CACHE/KEY/            train.bin  validation.bin  meta.json  tokenizer.json
CACHE/tokenizer-KEY/  tokenizer.json: a BPE trained on a corpus
CACHE/tmp.HOST.PID.X  being written

A directory is renamed into place when it is complete, so any number of processes may share a cache.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inl_jax.config import DataConfig, InputError
from inl_jax.console import first_line, say, size
from inl_jax.data.token_files import TokenFiles
from inl_jax.failures import DiskFull
from inl_jax.files import write_text
from inl_jax.text.sources import Entry
from inl_jax.tokens.tokenizer import Tokenizer

STALE_SECONDS = 24 * 3600
"""Another machine's temporary directory is removed if nothing was written to it for this long."""

SAID_BYTES = 2**32
"""Tokens whose verification takes long enough to be said."""

_FORMAT = 2  # part of every key: raise it if the same text would give other tokens


# What reading a damaged directory raises.
_DAMAGED = (ValueError, TypeError, KeyError, AttributeError, RecursionError, FileNotFoundError)


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


def write_meta(directory: Path, meta: dict[str, Any]) -> None:
    """Writes the fields of `TokenFiles` but its directory, and a digest of them."""
    write_text(directory / "meta.json", json.dumps(meta | {"digest": digest(meta)}, indent=2))


def read_finished(directory: Path, tokenizer: Tokenizer) -> TokenFiles | None:
    """The tokens in `directory`, opened; None if there are none.

    Reads all of them, once per process, and compares their digest. A directory that is damaged, as
    by a power cut or a bad disk, is removed.

    Raises:
      InputError: the directory cannot be read for another reason, or is none. Nothing is removed.
    """
    if directory.is_file() or (directory.is_symlink() and not directory.exists()):
        raise InputError(f"{directory}: is no directory of prepared tokens; remove it")
    try:
        if not directory.is_dir():
            return None
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        if meta.pop("digest") != digest(meta):
            raise ValueError("meta.json has changed")
        done = TokenFiles(directory, **meta)
        _verify(done, tokenizer)
        return done
    except _DAMAGED as error:
        reason = first_line(error)
    except OSError as error:  # the disk or the network may recover, and hours of work are kept here
        raise InputError(
            f"{directory}: cannot read the tokens kept there ({first_line(error)}); make it "
            "readable, remove it, or name another data.cache_dir"
        ) from error
    say(f"WARNING: {directory}: the tokens there are damaged ({reason}) and are prepared anew")
    remove(directory)
    return None


def _verify(done: TokenFiles, tokenizer: Tokenizer) -> None:
    train, validation = done.open("train"), done.open("validation")
    if (len(train), len(validation)) != (done.train_tokens, done.validation_tokens):
        raise ValueError("a file has another length")
    num_bytes = train.nbytes + validation.nbytes
    if num_bytes >= SAID_BYTES:
        say(f"data: verifying {size(num_bytes)} of tokens in {done.directory}")
    if digest(tokenizer.fingerprint, train.digest(), validation.digest()) != done.fingerprint:
        raise ValueError("they are not those that were written")


def remove(directory: Path) -> None:
    """Removes a damaged directory, though others may find it damaged at the same time.

    Raises:
      InputError: it cannot be removed.
    """
    aside = directory.with_name(_temporary_name())
    try:
        os.replace(directory, aside)
    except FileNotFoundError:  # another was first
        pass
    except OSError as error:
        raise InputError(
            f"{directory}: is damaged and cannot be removed ({error.strerror}); remove it, or name "
            "another data.cache_dir"
        ) from error
    shutil.rmtree(aside, ignore_errors=True)


def _temporary_name() -> str:
    return f"tmp.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"


@contextlib.contextmanager
def publishing(directory: Path) -> Iterator[Path]:
    """A temporary directory, renamed to `directory` at the end of the block, removed on errors.

    Raises:
      InputError: it cannot be made.
      DiskFull: what the block writes does not fit.
    """
    temporary = directory.with_name(_temporary_name())
    try:
        temporary.mkdir()
    except OSError as error:
        raise InputError(
            f"data.cache_dir={directory.parent}: {error.strerror}; name one that can be written"
        ) from error
    try:
        yield temporary
        try:
            os.replace(temporary, directory)
        except OSError:
            if not directory.is_dir():  # if it is, another process made the same one first
                raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = size(shutil.disk_usage(directory.parent).free)
        raise DiskFull(
            f"data.cache_dir={directory.parent}: {error.strerror}, {free} are free; make room "
            "there, or name another"
        ) from error
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
