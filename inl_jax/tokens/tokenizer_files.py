"""Tokenizers on disk: tokenizer.json, the files beside it that declare the end token, others."""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from inl_jax.checks import InputError
from inl_jax.console import first_line

FILE_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
_NAMING_FILES = (CONFIG_NAME, "special_tokens_map.json")  # have the end token by its name
_NUMBERING_FILES = ("generation_config.json", "config.json")  # have its id
FILES = (FILE_NAME, *_NAMING_FILES, *_NUMBERING_FILES, "tokenizer.model", "vocab.json", "vocab.txt")
"""What is fetched of a hub repository, as far as it is there."""


@contextlib.contextmanager
def one_line(what: str, advice: str) -> Iterator[None]:
    """Raises what goes wrong in the tokenizers library as an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"  # of Rust; not an Exception
        if not (panic or isinstance(error, Exception)):
            raise
        raise InputError(f"{what} ({first_line(error)[:200]}); {advice}") from error


def find(path: Path) -> Path:
    """The tokenizer.json that is `path`, or in the folder `path`.

    Raises:
      InputError: there is none; files of other kinds are named, and how to convert them.
    """
    with one_line(f"tokenizer {path}: cannot be read", "make it readable, or name another"):
        if path.is_file():
            _refuse_other_kind(path)
            return path
        if path.is_dir() and not (path / FILE_NAME).is_file():
            for file in sorted(path.iterdir()):
                if file.is_file():
                    _refuse_other_kind(file)
        if not (path / FILE_NAME).is_file():
            raise InputError(
                f"tokenizer {path}: no such file: {path / FILE_NAME if path.is_dir() else path}; "
                "name a tokenizer.json, or a folder that holds one"
            )
    _refuse_other_kind(path / FILE_NAME)
    return path / FILE_NAME


def read(file: Path, *, sha256: str | None = None) -> tokenizers.Tokenizer:
    """Reads a tokenizer.json.

    Raises:
      InputError: it is none, or does not have the digest that is given.
    """
    with one_line(f"tokenizer {file}: not a tokenizer.json", "copy it again, or name another"):
        content = file.read_bytes()
        if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
            raise InputError(
                f"tokenizer {file}: is not the file that was written there; restore it from a "
                f"copy, or remove inl_jax_sha256 from {CONFIG_NAME} if the change is meant"
            )
        return tokenizers.Tokenizer.from_str(content.decode("utf-8-sig"))


def is_old_bytes(file: Path) -> bool:
    """Whether a tokenizer.json is the bytes tokenizer as older directories hold it."""
    with open(file, "rb") as handle:
        return handle.read(40).strip() == b'{"inl_jax": "bytes"}'


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file beside a tokenizer.json; empty if there is no such file.

    Raises:
      InputError: the file holds anything else.
    """
    with one_line(f"tokenizer {file}: cannot be read", "copy it again, or remove it"):
        if not file.exists():
            return {}
        found = json.loads(file.read_text(encoding="utf-8-sig"))
        if not isinstance(found, dict):
            raise ValueError(f"a JSON object is wanted, and it holds {str(found)[:40]!r}")
    return found


def declared_end(folder: Path, backend: tokenizers.Tokenizer) -> int | None:
    """The id of the end token that the files in `folder` declare; None if they declare none.

    Raises:
      InputError: one of the files is damaged, or declares what is no token of `backend`.
    """
    vocab = backend.get_vocab()
    for name in _NAMING_FILES:
        token = read_object(folder / name).get("eos_token")
        if token is not None:
            text = token.get("content") if isinstance(token, dict) else token
            if not isinstance(text, str) or text not in vocab:
                raise InputError(
                    f"tokenizer {folder / name}: eos_token is {str(token)[:60]!r}, which is no "
                    f"token of {FILE_NAME}; name the token there that closes a document"
                )
            return vocab[text]
    for name in _NUMBERING_FILES:
        found = read_object(folder / name).get("eos_token_id")
        token_id = found[0] if isinstance(found, list) and found else found  # the others end turns
        if token_id is not None:
            if type(token_id) is not int or token_id not in vocab.values():
                raise InputError(
                    f"tokenizer {folder / name}: eos_token_id is {str(found)[:60]}, which is no id "
                    f"of {FILE_NAME}; write the id there of the token that closes a document"
                )
            return token_id
    return None


def _refuse_other_kind(file: Path) -> None:
    """Raises `InputError` for a vocabulary of another kind than tokenizer.json."""
    with open(file, "rb") as handle:
        head = handle.read(200)
    folder, what = file.parent, ""
    if re.match(rb"\n.\n", head, re.DOTALL):  # the first piece in the first message, as protobuf
        what = "a sentencepiece model; convert it: "
        if file.name != "tokenizer.model":
            what += f"rename it to {folder}/tokenizer.model, then "
        what += (
            "pip install transformers sentencepiece protobuf and "
            'python -c "from transformers import AutoTokenizer as T; '
            f"T.from_pretrained('{folder}').save_pretrained('{folder}')\", and name {folder}"
        )
    elif re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", head):
        what = (
            "a vocabulary for tiktoken, which does not say how text is split; name the "
            "tokenizer.json or the hub id of the same tokenizer"
        )
    elif head.startswith(b"version https://git-lfs"):
        what = "a pointer of Git LFS, not the data; run: git lfs pull"
    elif re.match(rb"\x80[\x02-\x05]", head):
        what = "a pickle, which could run code; name the tokenizer.json of the same tokenizer"
    elif file.name == "tekken.json":
        what = "Mistral's own kind; name the tokenizer.json of the same tokenizer"
    elif file.name in ("encoder.json", "vocab.bpe"):
        what = (
            "half of GPT-2's files under their older names; name gpt2 if it is GPT-2's, or rename "
            f"them to {folder}/vocab.json and {folder}/merges.txt"
        )
    elif file.name in ("vocab.json", "merges.txt"):
        what = (
            "half of a byte-level BPE, which does not say how text is split; if GPT-2's way is "
            'meant: python -c "from tokenizers import ByteLevelBPETokenizer as T; '
            f"T('{folder}/vocab.json', '{folder}/merges.txt').save('{folder}/{FILE_NAME}')\", and "
            f"name {folder}"
        )
    elif file.name == "vocab.txt":
        what = (
            "the vocabulary of a WordPiece, which does not say how text is split; if BERT's way "
            'is meant: python -c "from tokenizers import BertWordPieceTokenizer as T; '
            f"T('{file}').save('{folder}/{FILE_NAME}')\", and name {folder}"
        )
    if what:
        raise InputError(f"tokenizer {file}: is {what}")
