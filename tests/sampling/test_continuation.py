import itertools

import pytest
import vocabularies
from hypothesis import given, settings
from hypothesis import strategies as st

from inl_jax.config import InputError
from inl_jax.sampling.continuation import Continuation, encode_after
from inl_jax.tokens.tokenizer import Tokenizer, load_tokenizer, train_bpe

BYTES = load_tokenizer("bytes")
TOKENIZERS = {
    "bytes": BYTES,
    "bpe": train_bpe([vocabularies.PARAGRAPH * 9], 330),
    **{make.__name__: Tokenizer(make.__name__, make()) for make in vocabularies.ALL},
}
LIMIT = 10**6


def grow(tokenizer, prompt, ids, sizes, *, stop=(), limit=LIMIT, ended=True):
    """The continuation by these ids, in pieces of these sizes, and what was taken after each."""
    prompt_ids = tokenizer.encode(prompt).tolist()
    text = Continuation(tokenizer, prompt, prompt_ids, limit=limit, stop=stop)
    taken, left = [], list(ids)
    for size in itertools.cycle(sizes):
        now, left = left[:size], left[size:]
        text.add(now, [-1.0] * len(now), ended=ended and not left)
        taken.append(text.take())
        if not left:
            return text, taken


TEXTS = st.text(alphabet="ab \n€é🙂猫'.", max_size=12)
SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(TOKENIZERS)), prompt=TEXTS, data=st.data(), sizes=SIZES)
def test_continuation_streams_the_text_of_all_its_ids(name, prompt, data, sizes):
    """Whatever the decoder joins or drops, and also for ids that make no characters."""
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20))
    ids = [token for token in ids if token != tokenizer.end_id]
    text, taken = grow(tokenizer, prompt, ids, sizes)
    whole = tokenizer.decode_after(prompt, tokenizer.encode(prompt).tolist(), ids)
    assert "".join(taken) == text.text == whole.rstrip("\ufffd")


@pytest.mark.parametrize("name", ["bytes", "llama2", "metaspace"])
def test_continuation_gives_out_a_character_only_when_it_is_whole(name):
    tokenizer = TOKENIZERS[name]
    written = "x€🙂y"
    ids = tokenizer.encode("a" + written).tolist()[len(tokenizer.encode("a")) :]
    text, taken = grow(tokenizer, "a", ids, [1])
    assert len(ids) > len(written) and "".join(taken) == written
    assert set(taken) <= {"", *written}
    cut, taken = grow(tokenizer, "a", ids[:3], [1])  # in the middle of the euro sign
    assert "".join(taken) == cut.text == "x" and cut.finish_reason == "end"


@settings(max_examples=200, deadline=None)
@given(
    written=st.text("ab€", max_size=20),
    stop=st.lists(st.text("ab€", min_size=1, max_size=4), min_size=1, max_size=3),
    sizes=SIZES,
)
def test_continuation_ends_before_the_stop_string_that_is_complete_first(written, stop, sizes):
    text, taken = grow(BYTES, "ab", written.encode(), sizes, stop=stop)
    ends = [n for n in range(len(written) + 1) if written[:n].endswith(tuple(stop))]
    expected = written
    if ends:
        longest = max((s for s in stop if written[: ends[0]].endswith(s)), key=len)
        expected = written[: ends[0] - len(longest)]
    assert "".join(taken) == text.text == expected
    assert text.finish_reason == ("stop" if ends else "end")
    assert text.num_tokens == len(written[: ends[0] if ends else None].encode())


def test_continuation_ends_at_a_stop_string_inside_a_token():
    tokenizer = train_bpe(["the fox. the fox. " * 20], 300)
    ids = tokenizer.encode(" the fox. the fox.").tolist()
    assert len(ids) < 9
    text, taken = grow(tokenizer, "a", ids, [1], stop=["ox."])
    assert "".join(taken) == text.text == " the f" and text.num_tokens < len(ids)
    # What a conversation keeps: the whole tokens, and the rest of the one that was cut.
    assert tokenizer.decode(text.taken_ids()) == " the f"


@pytest.mark.parametrize("name", ["bytes", "bpe", "llama2", "metaspace"])
def test_encode_after_puts_no_space_between_two_texts(name):
    tokenizer = TOKENIZERS[name]
    for text in ("aba", " ab\n", "\n€"):
        ids = [*tokenizer.encode("ab."), *encode_after(tokenizer, text)]
        assert tokenizer.decode(ids) == f"ab.{text}"
    assert encode_after(tokenizer, "") == []
    with pytest.raises(InputError, match="not text that UTF-8 can hold"):
        encode_after(tokenizer, "\udcff")


def test_continuation_says_why_it_ends_and_how_likely_it_was():
    text, _ = grow(BYTES, "", b"abc", [2], limit=3, ended=False)
    assert (text.finish_reason, text.num_tokens) == ("length", 3)
    assert text.mean_log_probability == -1
    text, _ = grow(BYTES, "", b"", [1])
    assert (text.finish_reason, text.text, text.mean_log_probability) == ("end", "", None)
    growing, _ = grow(BYTES, "", b"abc", [2], ended=False)
    assert growing.finish_reason is None


def test_continuation_names_an_empty_stop_string():
    with pytest.raises(InputError, match="a stop string is empty"):
        Continuation(BYTES, "", [256], limit=1, stop=["a", ""])
