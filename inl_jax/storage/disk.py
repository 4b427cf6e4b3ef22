"""What a failed write means: a full disk, or another failure of the machine, in one line."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from inl_jax.console import size
from inl_jax.failures import DiskFull, MachineFailure
from inl_jax.storage.manifest import Damaged

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_failure(
    error: BaseException,
    directory: Path,
    *,
    needed: int = 0,
    what: str = "a checkpoint",
    stays: str = "the newest complete checkpoint stays",
) -> MachineFailure:
    """What to raise for an error of a write.

    Args:
      error: from the operating system, or from a library that wraps those.
      directory: where it was.
      needed: bytes that were to be written, if they are many.
      what: what they are.
      stays: what the failure has not harmed.
    """
    number = next(filter(None, map(_errno, _causes(error))), 0)
    if number in _FULL:
        needs = f"{what} takes {size(needed)}, " if needed else ""
        return DiskFull(
            f"{directory}: {os.strerror(number)}; {needs}{size(_free(directory))} are free, and "
            f"{stays}: free some disk, then run the same command"
        )
    reason = os.strerror(number) if number else reason_of(error)
    where = getattr(error, "filename2", None) or directory  # the file that was to be replaced
    return MachineFailure(
        f"{where}: cannot be written ({reason}); {stays}: mend that, then run the same command"
    )


def reason_of(error: BaseException) -> str:
    """An exception in one line of at most 400 characters."""
    if isinstance(error, Damaged):
        return str(error)
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _errno(error: BaseException) -> int:
    """The operating system's number of an error; 0 if it has none."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    # As TensorStore and as safetensors write it.
    found = re.search(r"(?:os_error_code='|\(os error )(\d+)", str(error))
    return int(found[1]) if found else 0


def _free(directory: Path) -> int:
    """Free bytes, of the parent if the directory is gone."""
    there = next(path for path in (directory, *directory.parents) if path.exists())
    return shutil.disk_usage(there).free
