import gzip

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from texts import BYTES, DOCUMENTS, GPT2, split_texts, write_files, write_jsonl

from inl_jax.config import InputError
from inl_jax.data import corpus
from inl_jax.text import documents
from inl_jax.text.sniff import HEAD_BYTES


def test_split_depends_on_the_document_and_not_on_its_place(make_corpus, tmp_path):
    (some,) = make_corpus(write_jsonl(tmp_path / "a.jsonl")).sources
    extra = [f"other {i}" for i in range(30)]
    (more,) = make_corpus(write_jsonl(tmp_path / "b.jsonl", extra + DOCUMENTS[::-1])).sources
    held_out = set(split_texts(some, "validation"))
    assert held_out == set(split_texts(more, "validation")) & set(DOCUMENTS)
    assert split_texts(more, "train") != sorted(split_texts(more, "train"))  # order is kept


def test_single_file_is_split_by_position(make_corpus, tmp_path):
    file = tmp_path / "big.txt"
    text = "".join(f"line {i} é\n" for i in range(1000))
    file.write_text(text)
    (source,) = make_corpus(file, validation_fraction=0.25).sources
    (train,), (validation,) = (split_texts(source, s) for s in ("train", "validation"))
    assert train + validation == text and train.endswith("\n")
    assert abs(source.validation_bytes / len(text.encode()) - 0.25) < 0.002
    assert source.documents == 1


@pytest.mark.parametrize("text", ["é" * 1001, "a\n" + "猫" * 500, "a" * 500 + "\n" + "b" * 3])
def test_long_lines_are_split_between_characters(make_corpus, tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    (source,) = make_corpus(tmp_path / "a.txt").sources
    (train,), (validation,) = (split_texts(source, s) for s in ("train", "validation"))
    assert train and validation and train + validation == text
    assert source.bad_utf8 == 0


# Any 130 characters of it have a place that is safe to cut.
TRICKY = (
    "def f(x):\n    return  x\t\t# naïve 猫猫\r\n\r\n  don't we'll 🙂🙂 123 456\n\n\n"
    + "a" * 90
    + " " * 90
    + "b\x85c\xa0d\u2003 e\u3000f \x1c g "
    + "é" * 80
    + " .;: \n x"
) * 3


@pytest.mark.parametrize(
    ("tokenizer", "size"),
    [*((BYTES, size) for size in (1, 2, 3, 7, 64)), *((GPT2, 130 + i) for i in range(0, 90, 7))],
)
def test_pieces_change_no_token(make_corpus, tmp_path, monkeypatch, tokenizer, size):
    monkeypatch.setattr(documents, "PIECE_SIZE", size)
    monkeypatch.setattr(corpus, "BATCH_BYTES", 100)
    (tmp_path / "a.txt").write_bytes(TRICKY.encode())
    write_jsonl(tmp_path / "a.jsonl", [TRICKY])
    expected = [*tokenizer.encode(TRICKY), tokenizer.end_id]
    for name in ("a.txt", "a.jsonl"):
        (source,) = make_corpus(tmp_path / name, using=tokenizer, validation_fraction=0).sources
        np.testing.assert_array_equal(source.open("train")[:], expected)
        assert source.documents == 1


def test_text_with_no_safe_place_is_cut_anyway(monkeypatch):
    monkeypatch.setattr(documents, "PIECE_SIZE", 10)
    pieces = list(documents._pieces([("é" * 10, 0)] * 3 + [("b c", 1)]))
    assert pieces == [("é" * 10, 0)] * 3 + [("b c", 1)]


@pytest.mark.parametrize("text", ["".join(f"line {i} é\n" for i in range(900)), "é" * 4000])
def test_packed_text_is_split_as_if_it_were_not_packed(tmp_path, monkeypatch, text):
    monkeypatch.setattr(documents, "PIECE_SIZE", 1000)
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    plain, packed = (
        [list(part.pieces()) for part in documents.split_file(tmp_path / name, 0.3, "error")]
        for name in ("a.txt", "a.txt.gz")
    )
    assert plain == packed and len(plain) == 2
    assert "".join(piece for part in plain for piece, _ in part) == text


@pytest.mark.parametrize("noise", [bytes(50_000), b"\xff" * 50_000])
@pytest.mark.parametrize("fraction", [0, 0.5])
def test_noise_after_the_first_bytes_is_refused(make_corpus, tmp_path, noise, fraction):
    (tmp_path / "a.txt").write_bytes(b"good text\n" * (HEAD_BYTES // 10 + 1) + noise)
    with pytest.raises(InputError, match="a.txt: not UTF-8 text .* characters are invalid"):
        make_corpus(tmp_path / "a.txt", validation_fraction=fraction)


@settings(max_examples=100, deadline=None)
@given(
    data=st.binary(max_size=40) | st.text(max_size=20).map(lambda t: t.encode(errors="replace")),
    size=st.integers(1, 9),
)
def test_any_bytes_decode_as_if_read_at_once(tmp_path_factory, data, size):
    file = tmp_path_factory.mktemp("any") / "a.txt"
    file.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE_SIZE", size)
        pieces = list(documents._read_span(file, "", 0, len(data), "replace"))
        expected = data.removeprefix(b"\xef\xbb\xbf").decode(errors="replace")
        assert "".join(text for text, _ in pieces) == expected
        genuine = data.removeprefix(b"\xef\xbb\xbf").decode(errors="ignore").count("\ufffd")
        assert sum(bad for _, bad in pieces) == expected.count("\ufffd") - genuine
        try:
            data.decode()
        except UnicodeDecodeError as error:
            with pytest.raises(InputError, match=rf"a\.txt, byte {error.start}: not UTF-8"):
                list(documents._read_span(file, "", 0, len(data), "error"))


def test_bad_utf8_in_a_file_is_replaced_and_counted_or_refused(make_corpus, tmp_path, said):
    (tmp_path / "d").mkdir()
    data = b"x" * (documents.PIECE_SIZE * 2 + 5) + b"\xff y"
    (tmp_path / "d" / "bad.txt").write_bytes(data)
    (tmp_path / "d" / "good.txt").write_bytes(b"good")
    (source,) = make_corpus(tmp_path / "d").sources
    assert source.bad_utf8 == 1 and "1 bad UTF-8" in said[-1]
    with pytest.raises(InputError, match=rf"bad\.txt, byte {data.index(0xFF)}: "):
        make_corpus(tmp_path / "d", bad_utf8="error")


@pytest.mark.parametrize("line", [b'{"text": "a\xffb"}', b'{"text": "a\\ud800b"}'])
def test_bad_utf8_in_jsonl_is_replaced_or_refused(make_corpus, tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    (source,) = make_corpus(tmp_path / "a.jsonl", validation_fraction=0).sources
    assert split_texts(source, "train") == ["fine", "a\ufffdb"]
    assert source.bad_utf8 == 1
    with pytest.raises(InputError, match=r"a\.jsonl, byte 28:|a\.jsonl line 2"):
        make_corpus(tmp_path / "a.jsonl", bad_utf8="error")


def test_bad_utf8_in_parquet_is_replaced_or_refused(make_corpus, tmp_path):
    strings = pa.array([b"a\xffb", b"fine"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"text": strings}), tmp_path / "a.parquet")
    (source,) = make_corpus(tmp_path / "a.parquet", validation_fraction=0).sources
    assert split_texts(source, "train") == ["a\ufffdb", "fine"]
    with pytest.raises(InputError, match=r"a\.parquet row 1, text, byte 1"):
        make_corpus(tmp_path / "a.parquet", bad_utf8="error")


def test_text_keeps_line_ends_and_loses_byte_order_marks(make_corpus, tmp_path):
    write_files(tmp_path / "d", ["\ufeffbom\r\nold\rmac\n", "", "\ufeff", "a\ufeff"])
    (source,) = make_corpus(tmp_path / "d", validation_fraction=0).sources
    assert split_texts(source, "train") == ["bom\r\nold\rmac\n", "a\ufeff"]


def test_max_documents_counts_for_each_path(make_corpus, tmp_path):
    a, b = write_jsonl(tmp_path / "a.jsonl"), write_files(tmp_path / "d")
    (source,) = make_corpus(a, b, max_documents=3, validation_fraction=0).sources
    assert split_texts(source, "train") == DOCUMENTS[:3] * 2


@pytest.mark.parametrize(
    "content",
    [bytes(range(128, 256)) * 9, "Text.\n".encode("utf-16-le") * 9],
    ids=["bytes", "UTF-16"],
)
def test_column_of_bytes_that_are_no_text_is_refused(make_corpus, tmp_path, content):
    parquet.write_table(pa.table({"content": [content, b"text"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet: not UTF-8 text"):
        make_corpus(tmp_path / "a.parquet")
