"""Where an entry of `data.paths` leads: a place on the disk, or a name on the Hugging Face hub."""

import stat
from pathlib import Path

from inl_jax.checks import InputError


def local_path(text: str) -> Path:
    """A path as the user wrote it, with `~` for the home directory.

    Raises:
      InputError: it is no path, as with the `~` of an unknown user.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise InputError(f"data.paths: {text}: {error}; write the whole path") from None


def mode_of(path: Path) -> int | None:
    """What `stat` says a path is, links followed; None if nothing is there.

    Raises:
      InputError: it cannot be a path (NUL, too long), or its directory cannot be searched.
    """
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"data.paths: {str(path)[:80]!r}: {reason}; name another path") from None


def special_kind(mode: int) -> str:
    """What a file is that is neither regular nor a directory, such as a pipe; else empty."""
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return ""
    return "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"


def hub_name(spec: str) -> tuple[str, str]:
    """The name and the config of `hf:NAME` or `hf:NAME@CONFIG`; a path may have an `@` of its own.

    Raises:
      InputError: as `mode_of`.
    """
    text = str(local_path(spec[3:])) if spec.startswith("hf:~") else spec[3:]
    ends = [len(text), *(i for i, letter in enumerate(text) if letter == "@" and i > 0)]
    for end in sorted(ends, reverse=True):
        if mode_of(Path(text[:end])) is not None:
            return text[:end], text[end + 1 :]
    name, _, config = text.partition("@")
    return name, config
