import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from inl_jax.tokens import fast_bpe, tokenizer
from inl_jax.tokens.tokenizer import load_tokenizer, train_bpe

TEXTS = [
    "the cat isn't on the mat, 42 times: naïve 猫猫 🙂🙂\r\n\t  and  <|endoftext|> again " * 30
]
TOKENIZERS = {"gpt2": load_tokenizer("gpt2"), "bpe": train_bpe(TEXTS, 500)}
BACKENDS = {name: each._backend for name, each in TOKENIZERS.items()}
FAST = {name: fast_bpe.make(backend, np.uint16) for name, backend in BACKENDS.items()}
every = pytest.mark.parametrize("name", TOKENIZERS)
# Much white space and many contractions, digits, marks, and characters of every plane.
hard = st.lists(
    st.sampled_from(
        [" ", "  ", "\n", "\r\n", "\0", "\u00a0", "\u3000", "\u2028", "'s", "'LL", "'re", "é", "猫"]
    )
    | st.text("aet019.-_ \n'", max_size=8)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    max_size=40,
).map("".join)


def slow_ids(backend, text):
    return backend.encode(text, add_special_tokens=False).ids


@every
@settings(max_examples=100, deadline=None)
@given(texts=st.lists(hard, max_size=4))
def test_fast_bpe_has_the_ids_of_the_tokenizers_library(name, texts):
    if FAST[name].agrees("".join(texts)):
        found = [ids.tolist() for ids in FAST[name].encode_batch(texts)]
        assert found == [slow_ids(BACKENDS[name], text) for text in texts]


@every
@pytest.mark.parametrize("text", ["a" * 20_000, " " * 20_000 + "x", "ab" * 9_000, "猫" * 5_000])
def test_fast_bpe_takes_long_words(name, text):
    assert FAST[name].encode_batch([text])[0].tolist() == slow_ids(BACKENDS[name], text)


def test_fast_bpe_knows_the_classes_of_most_characters():
    text = "".join(chr(code) for code in range(0x3000) if chr(code).isprintable())
    assert FAST["gpt2"].agrees(text + "猫 🙂")


def test_fast_bpe_does_not_agree_on_a_character_of_another_class():
    class OldLibrary:
        def pre_tokenize_str(self, pair):
            letters = pair[0] == "." and pair[1] == "é"  # as if é were no letter yet
            return [pair] if letters else [*pair]

    old = fast_bpe.FastBPE(OldLibrary(), {bytes([b]): b for b in range(256)}, np.arange(256))
    assert old.agrees("plain") and not old.agrees("caf\u00e9") and not old.agrees("\u00e9")


def byte_level(merges):
    """A byte-level BPE over any merges, also such that no training gives."""
    tokens = dict.fromkeys([*fast_bpe.letters_of_bytes(), *map("".join, merges)])
    backend = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return backend


@st.composite
def any_merges(draw):
    tokens, merges = ["a", "b"], []
    for _ in range(draw(st.integers(1, 7))):
        pair = draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens))
        if pair not in merges:
            merges.append(pair)
            tokens.append("".join(pair))
    return merges


@settings(max_examples=150, deadline=None)
@given(merges=any_merges(), text=st.text("ab", min_size=1, max_size=24))
def test_make_gives_the_same_ids_or_nothing_for_any_merges(merges, text):
    backend = byte_level(merges)
    if fast := fast_bpe.make(backend, np.uint16):
        assert fast.encode_batch([text])[0].tolist() == slow_ids(backend, text)


def test_make_refuses_what_tiktoken_would_encode_otherwise():
    assert fast_bpe.make(byte_level([("a", "b"), ("ab", "a")]), np.uint16)
    # aba becomes ab a, so the token a ba is never made; tiktoken would join ab a to it.
    assert fast_bpe.make(byte_level([("a", "b"), ("b", "a"), ("a", "ba")]), np.uint16) is None
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    assert fast_bpe.make(words, np.uint16) is None


@every
def test_encode_batch_gives_the_same_ids_with_and_without_tiktoken(name, monkeypatch, said):
    wanted = TOKENIZERS[name].encode_batch(TEXTS)
    monkeypatch.setattr(tokenizer, "_MUCH_TEXT", 0)
    made = []
    real = fast_bpe.make
    monkeypatch.setattr(fast_bpe, "make", lambda *args: made.append(real(*args)) or made[-1])
    found = tokenizer.Tokenizer("again", BACKENDS[name]).encode_batch(TEXTS)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    without = tokenizer.Tokenizer("again", BACKENDS[name]).encode_batch(TEXTS)
    assert made[0] and made[1] is None and "inl_jax[data]" in said[-1]
    for ids, one, other in zip(wanted, found, without, strict=True):
        assert ids.tolist() == one.tolist() == other.tolist()
        assert {each.dtype for each in (ids, one, other)} == {ids.dtype}
