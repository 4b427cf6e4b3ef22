"""Prompts of a command line: texts, files and what is piped in."""

import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

from inl_jax.checks import InputError


def read_prompts(prompts: Sequence[str], files: Sequence[Path]) -> list[str]:
    """The prompts, then the whole text of each file. A prompt `-` is the text of stdin.

    Without any, the prompt is what is piped in, or else empty.

    Raises:
      InputError: a file cannot be read, or a text is not UTF-8.
    """
    if not prompts and not files:
        prompts = ["-"] if _is_piped() else [""]
    if sum(prompt == "-" for prompt in prompts) > 1:
        raise InputError("--prompt - -: stdin can be read once; name it once")
    if "-" in prompts and sys.stdin is None:
        raise InputError("--prompt -: stdin is closed; pipe a text in, or give it as --prompt TEXT")
    found = [_text("stdin", sys.stdin.buffer.read()) if p == "-" else p for p in prompts]
    for file in files:
        try:
            found.append(_text(str(file), file.read_bytes()))
        except OSError as error:
            raise InputError(f"--prompt_file {file}: cannot be read ({error.strerror})") from None
    return found


def _is_piped() -> bool:
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # stdin is closed, or not of the system
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode().removeprefix("\ufeff")  # a byte order mark, as `inl train` drops it
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name}: is not UTF-8 (byte {error.start:,}); convert it, as with iconv -t UTF-8"
        ) from None
