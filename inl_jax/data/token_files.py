"""Token files: plain arrays on disk, read by position.

They are not memory-mapped: a process that reads a mapped file which is cut short dies by SIGBUS.
"""

import functools
import hashlib
import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from inl_jax.checks import InputError
from inl_jax.console import say

_BLOCK = 2**22  # bytes of one read while a file is verified
_digests: dict[tuple[int, ...], str] = {}  # by what tells a state of a file from others
_ANEW = "start again: what is damaged is prepared anew"


class Tokens:
    """The tokens of a file, `tokens[start:stop]`, checked whenever they are read.

    The file stays open, so it may be removed or replaced by another.
    """

    def __init__(self, file: Path, dtype: str, vocab_size: int):
        """Opens the file.

        Raises:
          OSError: it cannot be opened.
          ValueError: its length is not a whole number of tokens.
        """
        self.dtype = np.dtype(dtype)
        self._file, self._vocab_size = file, vocab_size
        self._handle = os.open(file, os.O_RDONLY)
        weakref.finalize(self, os.close, self._handle)
        state = os.fstat(self._handle)
        self._changed = state.st_mtime_ns
        self._len, rest = divmod(state.st_size, self.dtype.itemsize)
        if rest:
            raise ValueError(f"{file}: {state.st_size} bytes are no whole number of tokens")

    def __len__(self) -> int:
        return self._len

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self._len * self.dtype.itemsize

    def __getitem__(self, span: slice) -> np.ndarray:
        """The tokens of a slice without a step, `[tokens]` of the file's dtype.

        Raises:
          InputError: they cannot be read, are not all there any more, or are no ids of the
            tokenizer.
        """
        start, stop, _ = span.indices(self._len)
        width = self.dtype.itemsize
        wanted = max(0, stop - start) * width
        try:
            content = _read(self._handle, start * width, wanted)
            state = os.fstat(self._handle)
        except OSError as error:
            raise InputError(
                f"{self._file}, token {start}: {error.strerror}; look at the disk, then start again"
            ) from error
        if len(content) < wanted:
            raise InputError(
                f"{self._file}: was cut short to {state.st_size // width:,} of {self._len:,} "
                f"tokens; {_ANEW}"
            )
        if state.st_mtime_ns != self._changed:
            self._changed = state.st_mtime_ns
            say(f"WARNING: {self._file}: was written to after it was verified")
        tokens = np.frombuffer(content, self.dtype)
        if wanted and tokens.max() >= self._vocab_size:
            at = int(np.argmax(tokens >= self._vocab_size))
            raise InputError(
                f"{self._file}, token {start + at}: id {tokens[at]}, and the tokenizer has "
                f"{self._vocab_size} ids; {_ANEW}"
            )
        return tokens

    def digest(self) -> str:
        """Hex digest of the file, computed once per process as long as the file does not change.

        Raises:
          OSError: it cannot be read.
        """
        state = os.fstat(self._handle)
        key = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
        if key not in _digests:
            found, position = hashlib.blake2b(digest_size=16), 0
            while block := _read(self._handle, position, _BLOCK):
                found.update(block)
                position += len(block)
            _digests[key] = found.hexdigest()
        return _digests[key]


def _read(handle: int, position: int, length: int) -> bytes:
    """The bytes at a position, fewer only if the file ends there."""
    parts = []
    while length and (part := os.pread(handle, length, position)):
        parts.append(part)
        position, length = position + len(part), length - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


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
    unknown_tokens: int
    """Tokens that stand for text which the tokenizer cannot spell."""
    samples: int
    """Beginnings of pieces of the text that were encoded and decoded again."""
    lossy_samples: int
    """How many of them came back as another text."""
    dtype: str
    """uint16 or uint32."""
    vocab_size: int
    """Of the tokenizer."""
    fingerprint: str
    """Hex digest of the tokens and the tokenizer, whatever files the text came from."""

    def open(self, split: Literal["train", "validation"]) -> Tokens:
        """The tokens of a split. The first call opens both files, and they stay open.

        Raises:
          OSError: a file cannot be opened.
          ValueError: its length is not a whole number of tokens.
        """
        return self._opened[split]

    @functools.cached_property
    def _opened(self) -> dict[str, Tokens]:
        return {
            split: Tokens(self.directory / f"{split}.bin", self.dtype, self.vocab_size)
            for split in ("train", "validation")
        }
