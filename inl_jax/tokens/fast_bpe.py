"""The ids of a byte-level BPE by tiktoken: those of the tokenizers library, in less time.

tiktoken splits text by GPT-2's pattern as well, and then joins any two neighbours whose bytes
together are a token, the earliest token first. The tokenizers library joins the pairs in its list
of merges. The ids are equal if every token, taken as a text, becomes itself:

  Suppose that two neighbours X Y spell a token Z that the list makes of another pair. Nothing has
  been joined across the ends of X Y, so the same joins happen in the text Z alone, which therefore
  gets to X Y as well and stays there: Z does not become itself.

`make` tests this for the whole vocabulary. The libraries may know different versions of Unicode, in
which a character is a letter or nothing yet: `FastBPE.agrees` compares them on each new character.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import tokenizers

from inl_jax.console import say

# GPT-2's pattern. What does not look ahead is a group, which one automaton matches at once: that
# takes half the time of alternatives tried in turn. White space before a word is a single one.
_PATTERN = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s+(?!\S)|\s"
_OF_EACH_CLASS = ("a", "1", ".", "\n")  # letters, numbers, others, white space
_BETWEEN = "\0"  # the special token between texts that are encoded at once; none of them has it
_UNKNOWN, _SAME, _OTHER = range(3)  # class of a character, as the two libraries see it
_BYTES = {bytes([byte]): byte for byte in range(256)}


def letters_of_bytes() -> list[str]:
    """The character that stands for each byte in the vocabulary of a byte-level BPE.

    Printable bytes are themselves, the others U+0100 on.
    https://github.com/openai/gpt-2/blob/master/src/encoder.py, bytes_to_unicode
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


class FastBPE:
    """Encodes text as a byte-level BPE with GPT-2's pattern. Made by `make`."""

    def __init__(self, split: Any, ranks: dict[bytes, int], ids: np.ndarray):
        """Takes the tokenizers library's pre-tokenizer, the tokens' ranks, and the id of each."""
        self._split = split
        self._ids = np.append(ids, ids[:1])  # the last one stands for _BETWEEN and is not given out
        self._encoding = _encoding(ranks)
        self._verdicts = np.zeros(sys.maxunicode + 1, np.uint8)  # by character
        self._verdicts[:128] = _SAME

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of every text. Other threads run meanwhile, and may encode as well."""
        encode = self._encoding.encode_to_numpy
        if any(_BETWEEN in text for text in texts):
            return [self._ids[encode(text, disallowed_special=())] for text in texts]
        ranks = encode(_BETWEEN.join(texts), allowed_special="all")
        ids, between = self._ids[ranks], np.flatnonzero(ranks == len(self._ids) - 1).tolist()
        spans = zip([0, *(i + 1 for i in between)], [*between, len(ids)], strict=True)
        return [ids[start:stop] for start, stop in spans][: len(texts)]

    def agrees(self, text: str) -> bool:
        """Whether the tokenizers library puts every character of `text` into the same class."""
        if text.isascii():
            return True
        characters = np.frombuffer(text.encode("utf-32-le"), "<u4")
        new = characters[self._verdicts[characters] == _UNKNOWN]
        if len(new):
            self._compare(np.unique(new))
        return bool(np.all(self._verdicts[characters] == _SAME))

    def _compare(self, characters: np.ndarray) -> None:
        # Here the pair is also a token: tiktoken gives one id for a piece that is one.
        pairs = [self._pair(chr(character)) for character in characters]
        tokens = {pair.encode(): 256 + i for i, pair in enumerate(pairs)}
        probe = _encoding(_BYTES | tokens)
        same = [len(probe.encode_ordinary(pair)) == 1 for pair in pairs]
        self._verdicts[characters] = np.where(same, _SAME, _OTHER)

    def _pair(self, character: str) -> str:
        """The character after one of its class: the two make one piece."""
        pairs = (other + character for other in _OF_EACH_CLASS)
        return next(pair for pair in pairs if len(self._split.pre_tokenize_str(pair)) == 1)


def make(backend: tokenizers.Tokenizer, dtype: np.dtype) -> FastBPE | None:
    """A `FastBPE` with the ids of `backend`, which splits text as GPT-2 does and no further.

    Args:
      backend: the tokenizer.
      dtype: of the ids.

    Returns None if tiktoken is not installed, or would give other ids.
    """
    try:
        import tiktoken  # noqa: F401
    except ImportError:
        say("pip install 'inl_jax[data]' brings tiktoken, which tokenises four times as fast")
        return None
    model = json.loads(backend.to_str())["model"]
    options = ("unk_token", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    if model["type"] != "BPE" or any(model.get(option) for option in options):
        return None
    vocab = model["vocab"]
    byte_of = {letter: byte for byte, letter in enumerate(letters_of_bytes())}
    joined = ["".join(pair) for pair in model["merges"]]
    tokens = [*byte_of, *joined]
    if not all(token in vocab and byte_of.keys() >= set(token) for token in tokens):
        return None
    ranks = {bytes(byte_of[letter] for letter in t): rank for rank, t in enumerate(tokens)}
    if len(ranks) < len(tokens):  # two pairs make one token
        return None
    if any(len(backend.model.tokenize(token)) > 1 for token in joined):
        return None
    return FastBPE(backend.pre_tokenizer, ranks, np.array([vocab[t] for t in tokens], dtype))


def _encoding(ranks: dict[bytes, int]) -> Any:
    import tiktoken

    # Without any special token, tiktoken looks for the empty one at every character.
    return tiktoken.Encoding(
        "bpe", pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens={_BETWEEN: len(ranks)}
    )
