import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import vocabularies
from hypothesis import given, settings
from hypothesis import strategies as st

from inl_jax.data import corpus
from inl_jax.text import documents
from inl_jax.tokens import long_documents
from inl_jax.tokens.long_documents import Encoder, Part, parts
from inl_jax.tokens.tokenizer import Tokenizer, load_tokenizer

TOKENIZERS = {make.__name__: Tokenizer(make.__name__, make()) for make in vocabularies.ALL}
TOKENIZERS |= {name: load_tokenizer(name) for name in ("bytes", "gpt2")}
every = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)

PARTS = vocabularies.PARAGRAPH.splitlines(keepends=True)
texts = (
    st.lists(
        st.sampled_from(
            [*PARTS, *PARTS, "a" * 300, " " * 400, "1234567" * 60, "\n" * 200, "\u0301猫" * 90]
        )
        | st.text("abcdé猫🙂 .,'\n\t1=\u0301\u0130", max_size=40),
        min_size=1,
        max_size=30,
    )
    .map("".join)
    .filter(bool)
)


def encode(tokenizer, text, *, piece, batch=3):
    """As a corpus is encoded, from pieces of `piece` characters."""
    pieces = ((text[i : i + piece], 0) for i in range(0, len(text), piece))
    cut = list(parts(pieces, tokenizer))
    batches = (cut[i : i + batch] for i in range(0, len(cut), batch))
    with ThreadPoolExecutor(2) as pool:
        encoded = list(Encoder(tokenizer, pool).encode(batches))
    return np.concatenate(list(itertools.chain(*encoded)))


@every
@settings(max_examples=12, deadline=None)
@given(text=texts, piece=st.sampled_from([1, 7, 50, 400, 1000]))
def test_tokens_do_not_depend_on_the_pieces(tokenizer, text, piece):
    piece = max(piece, len(text) // 40)  # each piece is encoded with much of the text before it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_documents, "OVERLAP", 500)
        patch.setattr(long_documents, "SHARED", 8)
        found = encode(tokenizer, text, piece=piece)
    np.testing.assert_array_equal(found, tokenizer.encode(text))


@every
def test_file_has_the_tokens_of_its_text(make_corpus, tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(documents, "PIECE_SIZE", 3000)
    monkeypatch.setattr(long_documents, "OVERLAP", 500)
    monkeypatch.setattr(corpus, "BATCH_BYTES", 10_000)
    texts = [vocabularies.PARAGRAPH * 150, "short", "1234567" * 3000, "", "a b" * 2000]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_bytes(text.encode())
    made = make_corpus(tmp_path / "*.txt", using=tokenizer, validation_fraction=0)
    wanted = [[*tokenizer.encode(text), tokenizer.end_id] for text in texts if text]
    np.testing.assert_array_equal(made.sources[0].open("train")[:], np.concatenate(wanted))


def test_encoder_encodes_in_all_threads_and_reads_no_further_than_needed(monkeypatch):
    tokenizer, read = TOKENIZERS["gpt2"], []
    together, real = threading.Barrier(2), tokenizer.encode_batch
    monkeypatch.setattr(long_documents, "usable_cpus", lambda: 2)
    monkeypatch.setattr(
        tokenizer, "encode_batch", lambda texts: (together.wait(60), real(texts))[1]
    )
    batches = ([Part(str(i))] for i in range(12) if read.append(i) is None)
    with ThreadPoolExecutor(2) as pool:
        for i, (ids,) in enumerate(Encoder(tokenizer, pool).encode(batches)):
            assert tokenizer.decode(ids) == str(i) and len(read) <= i + 5


def test_long_document_is_encoded_in_parts(monkeypatch):
    """And not at once: memory would grow with the document."""
    lengths = []
    tokenizer = TOKENIZERS["llama2"]
    real = tokenizer.encode_batch
    monkeypatch.setattr(
        tokenizer, "encode_batch", lambda texts: lengths.extend(map(len, texts)) or real(texts)
    )
    text = vocabularies.PARAGRAPH * 400
    found = encode(tokenizer, text, piece=10_000)
    assert max(lengths) <= 10_000 + long_documents.OVERLAP
    np.testing.assert_array_equal(found, real([text])[0])


def test_document_without_a_place_to_cut_is_cut_and_said(monkeypatch, said):
    monkeypatch.setattr(long_documents, "LONGEST", 20_000)
    tokenizer = TOKENIZERS["wordpiece"]
    found = encode(tokenizer, "x" * 50_000, piece=9000)
    assert found.tolist() == [tokenizer.unknown_id] * 3
    assert said[0] == (
        "WARNING: 18,000 characters of a document cannot be encoded in parts by wordpiece; it is "
        "cut after character 18,000"
    )
    assert len(said) == 2
