import dataclasses
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from inl_jax.config import DataConfig, InputError
from inl_jax.data import corpus
from inl_jax.data.corpus import prepare
from inl_jax.data.tokenizer import Tokenizer, load, load_tokenizer

BYTES = load_tokenizer("bytes")
GPT2 = load_tokenizer("gpt2")
DOCUMENTS = [f"Document {i}: naïve 猫 🙂\r\n" + "words and more words\n" * i for i in range(40)]


def quiet(line):
    pass


@pytest.fixture
def make(tmp_path):
    """prepare(paths, fields of DataConfig ...) with bytes, half held out and a cache of its own."""

    def make(*paths, using=None, report=quiet, **fields):
        defaults = {"tokenizer": "bytes", "validation_fraction": 0.5}
        data = DataConfig(
            paths=tuple(map(str, paths)), cache_dir=str(tmp_path / "cache"), **defaults | fields
        )
        return prepare(data, tokenizer=using, report=report)

    return make


def write_files(folder, documents=DOCUMENTS):
    folder.mkdir(parents=True)
    for i, text in enumerate(documents):
        (folder / f"{i:03}.txt").write_bytes(text.encode())
    return folder


def write_jsonl(file, documents=DOCUMENTS, column="text", opener=open):
    with opener(file, "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"id": 1, column: text}) + "\n" for text in documents)
    return file


def split_texts(source, split, tokenizer=BYTES):
    """The documents of a split, in order."""
    ids = source.open(split)
    ends = np.flatnonzero(ids == tokenizer.end_id)
    assert len(ids) == 0 or ends[-1] == len(ids) - 1, "every document must be closed"
    return [tokenizer.decode(part) for part in np.split(ids, ends + 1)[:-1]]


def leftovers(tmp_path):
    return [path.name for path in (tmp_path / "cache").iterdir()]


def write_every_kind(folder):
    datasets = pytest.importorskip("datasets")
    table = pa.table({"id": range(len(DOCUMENTS)), "text": DOCUMENTS})
    parquet.write_table(table, folder / "a.parquet")
    (folder / "hub").mkdir()
    parquet.write_table(table, folder / "hub" / "train.parquet")
    datasets.Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(folder / "disk")
    write_files(folder / "files")
    return [
        folder / "files",
        folder / "files" / "*.txt",
        write_jsonl(folder / "a.jsonl"),
        write_jsonl(folder / "a.jsonl.gz", opener=gzip.open),
        folder / "a.parquet",
        f"hf:{folder / 'hub'}",
        f"hf:{folder / 'disk'}",
    ]


def test_every_source_kind_gives_the_same_tokens(make, tmp_path):
    kinds = write_every_kind(tmp_path)
    made = [make(kind, using=GPT2) for kind in kinds]
    assert len({c.fingerprint for c in made}) == 1
    assert len({c.sources[0].directory for c in made}) == len(kinds) - 1  # the glob's files
    (source,) = made[0].sources
    assert source.documents == len(DOCUMENTS)
    texts = [split_texts(source, split, GPT2) for split in ("train", "validation")]
    assert sorted(texts[0] + texts[1]) == sorted(DOCUMENTS)
    assert source.train_bytes == sum(len(text.encode()) for text in texts[0])
    assert source.validation_bytes == sum(len(text.encode()) for text in texts[1])
    assert source.train_tokens == len(source.open("train"))
    assert min(map(len, texts)) > 5


def test_split_follows_the_document_and_not_its_place(make, tmp_path):
    (some,) = make(write_jsonl(tmp_path / "a.jsonl")).sources
    extra = [f"other {i}" for i in range(30)]
    (more,) = make(write_jsonl(tmp_path / "b.jsonl", extra + DOCUMENTS[::-1])).sources
    held_out = set(split_texts(some, "validation"))
    assert held_out == set(split_texts(more, "validation")) & set(DOCUMENTS)
    assert split_texts(more, "train") != sorted(split_texts(more, "train"))  # order is kept


@pytest.mark.parametrize(("fraction", "split"), [(0.0, "train"), (1.0, "validation")])
def test_all_to_one_side(make, tmp_path, fraction, split):
    file = write_files(tmp_path / "one", ["only this\nfile\n"]) / "000.txt"
    for path, texts in ((file, ["only this\nfile\n"]), (write_files(tmp_path / "d"), DOCUMENTS)):
        (source,) = make(path, validation_fraction=fraction).sources
        assert split_texts(source, split) == texts
        other = source.open("validation" if split == "train" else "train")
        assert other.shape == (0,) and other.dtype == np.uint16


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_neither_side_is_empty(make, tmp_path, fraction):
    few = write_jsonl(tmp_path / "a.jsonl", ["a", "b", "c"])
    (source,) = make(few, validation_fraction=fraction).sources
    texts = split_texts(source, "train"), split_texts(source, "validation")
    assert sorted(map(len, texts)) == [1, 2]
    assert sorted(texts[0] + texts[1]) == ["a", "b", "c"]
    assert source.documents == 3
    same = write_jsonl(tmp_path / "b.jsonl", ["a", "a"])  # nothing to tell them apart
    (source,) = make(same, validation_fraction=fraction).sources
    assert split_texts(source, "train") == ["a", "a"]


def test_single_file_is_split_by_position(make, tmp_path):
    file = tmp_path / "big.txt"
    text = "".join(f"line {i} é\n" for i in range(1000))
    file.write_text(text)
    (source,) = make(file, validation_fraction=0.25).sources
    (train,), (validation,) = (split_texts(source, s) for s in ("train", "validation"))
    assert train + validation == text and train.endswith("\n")
    assert abs(source.validation_bytes / len(text.encode()) - 0.25) < 0.002
    assert source.documents == 1


@pytest.mark.parametrize("text", ["é" * 1001, "a\n" + "猫" * 500, "a" * 500 + "\n" + "b" * 3])
def test_long_lines_are_split_between_characters(make, tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    (source,) = make(tmp_path / "a.txt").sources
    (train,), (validation,) = (split_texts(source, s) for s in ("train", "validation"))
    assert train and validation and train + validation == text
    assert source.bad_utf8 == 0


# No 130 characters of it are without a place that is safe to cut.
TRICKY = (
    "def f(x):\n    return  x\t\t# naïve 猫猫\r\n\r\n  don't we'll 🙂🙂 123 456\n\n\n"
    + "a" * 90
    + " " * 90
    + "b\x85c\xa0d\u2003 e\u3000f \x1c g "
    + "é" * 80
    + " .;: \n x"
) * 3


@pytest.mark.parametrize(
    ("tokenizer", "chunk"),
    [*((BYTES, chunk) for chunk in (1, 2, 3, 7, 64)), *((GPT2, 130 + i) for i in range(0, 90, 7))],
)
def test_chunks_change_no_token(make, tmp_path, monkeypatch, tokenizer, chunk):
    monkeypatch.setattr(corpus, "CHUNK", chunk)
    monkeypatch.setattr(corpus, "BATCH_BYTES", 100)
    (tmp_path / "a.txt").write_bytes(TRICKY.encode())
    write_jsonl(tmp_path / "a.jsonl", [TRICKY])
    expected = [*tokenizer.encode(TRICKY), tokenizer.end_id]
    for name in ("a.txt", "a.jsonl"):
        (source,) = make(tmp_path / name, using=tokenizer, validation_fraction=0).sources
        np.testing.assert_array_equal(source.open("train"), expected)
        assert source.documents == 1


def test_text_with_no_safe_place_is_cut_anyway(monkeypatch):
    monkeypatch.setattr(corpus, "CHUNK", 10)
    pieces = list(corpus._pieces([("é" * 10, 0)] * 3 + [("b c", 1)]))
    assert pieces == [("é" * 10, 0)] * 3 + [("b c", 1)]


@settings(max_examples=100, deadline=None)
@given(
    data=st.binary(max_size=40) | st.text(max_size=20).map(lambda t: t.encode(errors="replace")),
    chunk=st.integers(1, 9),
)
def test_any_bytes_decode_as_if_read_at_once(tmp_path_factory, data, chunk):
    file = tmp_path_factory.mktemp("any") / "a.txt"
    file.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "CHUNK", chunk)
        pieces = list(corpus._read_span(file, 0, len(data), "replace"))
        expected = data.removeprefix(b"\xef\xbb\xbf").decode(errors="replace")
        assert "".join(text for text, _ in pieces) == expected
        genuine = data.removeprefix(b"\xef\xbb\xbf").decode(errors="ignore").count("\ufffd")
        assert sum(bad for _, bad in pieces) == expected.count("\ufffd") - genuine
        try:
            data.decode()
        except UnicodeDecodeError as error:
            with pytest.raises(InputError, match=rf"a\.txt, byte {error.start}: not UTF-8"):
                list(corpus._read_span(file, 0, len(data), "error"))


def test_bad_utf8(make, tmp_path):
    (tmp_path / "d").mkdir()
    data = b"x" * (corpus.CHUNK * 2 + 5) + b"\xff y"
    (tmp_path / "d" / "bad.txt").write_bytes(data)
    (tmp_path / "d" / "good.txt").write_bytes(b"good")
    lines = []
    (source,) = make(tmp_path / "d", report=lines.append).sources
    assert source.bad_utf8 == 1 and "1 bad UTF-8" in lines[-1]
    with pytest.raises(InputError, match=rf"bad\.txt, byte {data.index(0xFF)}: "):
        make(tmp_path / "d", bad_utf8="error")


@pytest.mark.parametrize("line", [b'{"text": "a\xffb"}', b'{"text": "a\\ud800b"}'])
def test_bad_utf8_in_rows(make, tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    (source,) = make(tmp_path / "a.jsonl", validation_fraction=0).sources
    assert split_texts(source, "train") == ["fine", "a\ufffdb"]
    assert source.bad_utf8 == 1
    with pytest.raises(InputError, match=r"a\.jsonl, byte 28:|a\.jsonl line 2"):
        make(tmp_path / "a.jsonl", bad_utf8="error")


def test_bad_utf8_in_parquet(make, tmp_path):
    strings = pa.array([b"a\xffb", b"fine"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"text": strings}), tmp_path / "a.parquet")
    (source,) = make(tmp_path / "a.parquet", validation_fraction=0).sources
    assert split_texts(source, "train") == ["a\ufffdb", "fine"]
    with pytest.raises(InputError, match=r"a\.parquet row 1, text, byte 1"):
        make(tmp_path / "a.parquet", bad_utf8="error")


def test_text_is_taken_as_it_is(make, tmp_path):
    write_files(tmp_path / "d", ["\ufeffbom\r\nold\rmac\n", "", "\ufeff", "a\ufeff"])
    (source,) = make(tmp_path / "d", validation_fraction=0).sources
    assert split_texts(source, "train") == ["bom\r\nold\rmac\n", "a\ufeff"]


def test_directories(make, tmp_path):
    for name in ("b.txt", "a/z.md", "a/b/c.py", ".git/config.txt", "a/.hidden.txt", "a/x.png"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_text(name)
    write_jsonl(tmp_path / "d" / "a" / "r.jsonl", ["row"])
    lines = []
    (source,) = make(tmp_path / "d", validation_fraction=0, report=lines.append).sources
    assert split_texts(source, "train") == ["b.txt", "row", "a/z.md", "a/b/c.py"]
    assert "skipped 1 files" in lines[0] and ".png" in lines[0]


def test_stdlib(make):
    (source,) = make("stdlib", max_documents=30).sources
    assert source.documents == 30
    entry = corpus._find("stdlib", quiet)
    names = {str(file) for file in entry.files}
    assert 500 < len(names) < 1200
    assert not [n for n in names if re.search(r"/(site-packages|test|tests|idle_test)/", n)]
    assert 8e6 < entry.size() < 20e6


@pytest.mark.parametrize(
    ("row", "column", "text"),
    [
        ({"Text": "t", "code": "c"}, "", "t"),
        ({"code": "c", "CONTENT": "t"}, "", "t"),
        ({"data": "t", "id": 3}, "", "t"),
        ({"prompt": "a", "completion": "b"}, "", "ab"),
        ({"prompt": "a", "completion": None}, "", "a"),
        ({"text": "no", "Body": "t"}, "Body", "t"),
        ({"text": "no", "Body": "t"}, "body", "t"),
    ],
)
def test_text_columns(make, tmp_path, row, column, text):
    empty = [dict.fromkeys(row), dict.fromkeys(row, "")]
    lines = "\n\n".join(json.dumps(r) for r in [*empty, row])
    (tmp_path / "a.jsonl").write_text(lines)
    table = pa.Table.from_pylist([{k: v or "" for k, v in row.items()}])
    parquet.write_table(table, tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        (source,) = make(tmp_path / name, column=column, validation_fraction=0).sources
        assert split_texts(source, "train") == [text]
        assert source.documents == 1


def test_max_documents(make, tmp_path):
    a, b = write_jsonl(tmp_path / "a.jsonl"), write_files(tmp_path / "d")
    (source,) = make(a, b, max_documents=3, validation_fraction=0).sources
    assert split_texts(source, "train") == DOCUMENTS[:3] * 2


def test_weights_give_one_source_per_path_and_one_tokenizer(make, tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", ["aaaa bbbb " * 50, "aaaa"])
    b = write_jsonl(tmp_path / "b.jsonl", ["cccc dddd " * 50, "cccc"])
    both = make(a, b, weights=(3.0, 1.0), tokenizer="bpe:280")
    assert both.weights == (3.0, 1.0) and len(both.sources) == 2
    joined = make(a, b, tokenizer="bpe:280")
    assert joined.weights == (1.0,) and len(joined.sources) == 1
    assert joined.tokenizer.fingerprint == both.tokenizer.fingerprint
    for source, word in zip(both.sources, ("aaaa", "cccc"), strict=True):
        saved = load(source.directory)
        assert (saved.name, saved.fingerprint) == ("bpe:280", both.tokenizer.fingerprint)
        assert len(saved.encode(word)) == 1  # merged: both paths were trained on
        texts = split_texts(source, "train", saved) + split_texts(source, "validation", saved)
        assert len(texts) == 2 and all(text.startswith(word) for text in texts)


def test_bpe_sample_spans_the_corpus_within_its_bound(make, tmp_path, monkeypatch):
    seen = []
    real = corpus.tokenizers.train_bpe
    monkeypatch.setattr(
        corpus.tokenizers, "train_bpe", lambda texts, size: real(seen.extend(texts) or seen, size)
    )
    monkeypatch.setattr(corpus, "BPE_SAMPLE_BYTES", 2000)
    documents = [f"{i:04} " + "x" * 95 for i in range(200)]
    make(write_files(tmp_path / "d", documents), tokenizer="bpe:260")
    assert 1500 <= sum(map(len, seen)) <= 2100
    assert seen[0] == documents[0] and seen[-1] in documents[-20:]


def forbid_encoding(monkeypatch):
    def refuse(self, texts):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(Tokenizer, "encode_batch", refuse)


def test_second_call_uses_the_cache(make, tmp_path, monkeypatch):
    folder = write_files(tmp_path / "d")
    first = make(folder, tokenizer="bpe:270")
    forbid_encoding(monkeypatch)
    monkeypatch.setattr(corpus.tokenizers, "train_bpe", None)
    lines = []
    again = make(folder, tokenizer="bpe:270", report=lines.append)
    assert again.sources == first.sources and again.fingerprint == first.fingerprint
    assert "from the cache" in lines[0]


def test_every_change_asks_for_other_tokens(make, tmp_path):
    folder = write_files(tmp_path / "d")
    changes = [
        {},
        {"tokenizer": "gpt2"},
        {"validation_fraction": 0.4},
        {"max_documents": 39},
        {"bad_utf8": "error"},
        {"tokenizer": "bpe:258"},
    ]
    directories = {make(folder, **change).sources[0].directory for change in changes}
    os.utime(folder / "003.txt", (1, 1))
    directories.add(make(folder).sources[0].directory)
    (folder / "new.txt").write_text("new")
    directories.add(make(folder).sources[0].directory)
    assert len(directories) == len(changes) + 2


def test_content_fingerprint_knows_no_place_or_time(make, tmp_path):
    a, b = write_files(tmp_path / "a"), write_files(tmp_path / "b" / "c")
    os.utime(b / "001.txt", (1, 1))
    one, two = make(a), make(b)
    assert one.fingerprint == two.fingerprint
    assert one.sources[0].directory != two.sources[0].directory
    (b / "001.txt").write_text("else")
    assert make(b).fingerprint != one.fingerprint
    assert make(a, tokenizer="gpt2").fingerprint != one.fingerprint
    assert make(a, validation_fraction=0.1).fingerprint != one.fingerprint


def test_order_of_files_is_fixed(make, tmp_path, monkeypatch):
    folder = write_files(tmp_path / "d")
    first = make(folder)
    real = os.walk
    monkeypatch.setattr(os, "walk", lambda root: ((a, b, c[::-1]) for a, b, c in real(root)))
    assert make(folder).sources == first.sources


def test_interruption_leaves_nothing_that_looks_finished(make, tmp_path, monkeypatch):
    folder = write_files(tmp_path / "d")
    monkeypatch.setattr(corpus, "BATCH_BYTES", 1000)
    real, calls = Tokenizer.encode_batch, []

    def interrupted(self, texts):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(folder)
    assert leftovers(tmp_path) == []
    (source,) = make(folder).sources
    assert leftovers(tmp_path) == [source.directory.name]
    assert source.documents == len(DOCUMENTS)


SLOW_WRITER = """
import sys, time
from inl_jax import corpus
from inl_jax.config import DataConfig
from inl_jax.data.tokenizer import Tokenizer
corpus.BATCH_BYTES = 1000
real = Tokenizer.encode_batch
def slow(self, texts):
    time.sleep(float(sys.argv[3]))
    return real(self, texts)
Tokenizer.encode_batch = slow
made = corpus.prepare(DataConfig(paths=(sys.argv[1],), tokenizer="bytes", cache_dir=sys.argv[2],
                                 validation_fraction=0.5))
print(made.fingerprint, made.sources[0].directory)
"""


def start_writer(folder, cache, delay):
    command = [sys.executable, "-c", SLOW_WRITER, str(folder), str(cache), str(delay)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_killed_writer_leaves_nothing_that_looks_finished(make, tmp_path):
    folder, cache = write_files(tmp_path / "d"), tmp_path / "cache"
    writer = start_writer(folder, cache, 5)
    deadline = time.monotonic() + 30
    while not list(cache.glob("tmp.*/train.bin")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (source,) = make(folder).sources  # beside a living writer, whose files stay
    assert list(cache.glob("tmp.*"))
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    (again,) = make(folder).sources
    assert again == source
    assert leftovers(tmp_path) == [source.directory.name]


def test_two_at_once(tmp_path):
    folder, cache = write_files(tmp_path / "d"), tmp_path / "cache"
    writers = [start_writer(folder, cache, 0.01) for _ in range(2)]
    printed = [writer.communicate()[0].splitlines()[-1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0]
    assert printed[0] == printed[1]
    assert len(leftovers(tmp_path)) == 1


def test_many_threads_at_once(make, tmp_path):
    folder = write_files(tmp_path / "d")
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: make(folder, tokenizer="bpe:270"), range(4)))
    assert len({c.fingerprint for c in made}) == 1
    assert len(leftovers(tmp_path)) == 2


def test_damaged_cache_is_made_again(make, tmp_path):
    folder = write_files(tmp_path / "d")
    (first,) = make(folder).sources
    tokens = np.array(first.open("train"))
    for name in ("train.bin", "meta.json"):
        (first.directory / name).write_bytes(b"")
        (again,) = make(folder).sources
        np.testing.assert_array_equal(again.open("train"), tokens)


def test_full_disk(make, tmp_path, monkeypatch):
    def full(self, directory):
        raise OSError(28, "No space left on device")

    folder = write_files(tmp_path / "d")
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "save", full)
        with pytest.raises(OSError, match="No space left"):
            make(folder)
    assert leftovers(tmp_path) == []
    make(folder)


def damage(file, keep):
    file.write_bytes(file.read_bytes()[:keep])
    return file


def write(file, content):
    file.write_bytes(content)
    return file


def write_parquet(file, **columns):
    parquet.write_table(pa.table(columns), file)
    return file


ROW = b'{"text": "a"}\n'
ERRORS = {
    "missing": (lambda d: d / "none.txt", "no such file or directory: .*none.txt; .* hf:owner/"),
    "nothing": (lambda d: "", "an entry is ''"),
    "hf nothing": (lambda d: "hf:", "an entry is 'hf:'"),
    "glob": (lambda d: d / "*.none", "no file matches .*none"),
    "hf path": (lambda d: f"hf:{d}/none", "no such directory: .*none"),
    "hf split": (lambda d: write_hub(d), "split train: .*"),
    "empty file": (lambda d: write(d / "a.txt", b""), "no text in .*a.txt"),
    "empty jsonl": (lambda d: write(d / "a.jsonl", b'{"text": ""}\n'), "no text in .*a.jsonl"),
    "empty directory": (lambda d: d, "holds no text"),
    "packed": (lambda d: write(d / "a.zip", b"PK"), "a.zip is packed"),
    "parquet": (lambda d: write(d / "a.parquet", b"no"), "a.parquet: damaged, or not parquet"),
    "cut parquet": (
        lambda d: damage(write_parquet(d / "b.parquet", text=DOCUMENTS), 500),
        "b.parquet: damaged, or not parquet",
    ),
    "cut gzip": (
        lambda d: damage(write_jsonl(d / "a.jsonl.gz", opener=gzip.open), 300),
        "a.jsonl.gz: damaged gzip",
    ),
    "no gzip": (lambda d: write(d / "a.jsonl.gz", ROW), "a.jsonl.gz: damaged gzip"),
    "json": (lambda d: write(d / "a.jsonl", ROW + b"\n{oops\n"), "a.jsonl line 3: invalid JSON"),
    "list": (lambda d: write(d / "a.jsonl", ROW + b"[1]"), "a.jsonl line 2: list, where an obj"),
    "number": (lambda d: write(d / "a.jsonl", b'{"text": 1}'), "line 1: column text holds int"),
    "column": (
        lambda d: write(d / "a.jsonl", b'{"id": "a", "body": "b"}'),
        "line 1: no text column; set data.column to one of: id, body",
    ),
    "parquet column": (
        lambda d: write_parquet(d / "c.parquet", id=[1], body=["b"]),
        "c.parquet: no text column; set data.column to one of: id, body",
    ),
}


def write_hub(folder):
    (folder / "hub").mkdir()
    write_jsonl(folder / "hub" / "test.jsonl")
    return f"hf:{folder / 'hub'}"


@pytest.mark.parametrize("kind", ERRORS)
def test_mistakes_are_one_line_and_leave_nothing(make, tmp_path, kind):
    (tmp_path / "given").mkdir()
    build, complaint = ERRORS[kind]
    path = build(tmp_path / "given")
    with pytest.raises(InputError, match=complaint) as caught:
        make(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists() or leftovers(tmp_path) == []


def test_column_that_is_not_there_is_named(make, tmp_path):
    with pytest.raises(InputError, match="no column body; set data.column to one of: id, text"):
        make(write_jsonl(tmp_path / "a.jsonl"), column="body")


@pytest.mark.parametrize("name", ["bpe:many", "bpe:", "bpe:256"])
def test_bad_bpe(make, tmp_path, name):
    with pytest.raises(InputError, match=f"data.tokenizer={name}"):
        make(write_jsonl(tmp_path / "a.jsonl"), tokenizer=name)


def test_absent_packages_are_named(make, tmp_path, monkeypatch):
    for package, path in (
        ("pyarrow", write_parquet(tmp_path / "a.parquet", text=["a"])),
        ("datasets", "hf:owner/name"),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(InputError, match=rf"needs {package}; pip install 'inl_jax\[data\]'"):
            make(path)


def test_progress(make, tmp_path, monkeypatch, capsys):
    clock = iter(range(0, 10**6, 4))
    monkeypatch.setattr(corpus.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(corpus, "BATCH_BYTES", 1000)
    folder, lines = write_files(tmp_path / "d"), []
    make(folder, report=lines.append)
    assert len(lines) > 2 and re.fullmatch(r"data: .* MB/s, .* s left of .* MB", lines[0])
    assert lines[-1].startswith("data: 40 documents, ") and "bytes per token" in lines[-1]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    lines.clear()
    make(folder, report=lines.append, validation_fraction=0.1)
    assert len(lines) == 1 and "\r" in capsys.readouterr().err


def test_modules_import_neither_jax_nor_flax():
    for name in ("corpus.py", "tokenizer.py"):
        source = Path(corpus.__file__).with_name(name).read_text()
        assert not re.search(r"^ *(import|from) (jax|flax)\b", source, re.M)
        assert not re.search(r"^(import|from) (pyarrow|datasets)\b", source, re.M)


def test_prepare_data_script(tmp_path):
    write_files(tmp_path / "d")
    config = tmp_path / "config.py"
    config.write_text("from inl_jax.config import TrainConfig\nconfig = TrainConfig()\n")
    root = Path(__file__).parents[2]
    command = [
        sys.executable,
        root / "scripts" / "prepare_data.py",
        "--config",
        config,
        "--data.tokenizer",
        "bytes",
        "--data.cache_dir",
        tmp_path / "cache",
        "--data.paths",
    ]
    environment = os.environ | {"PYTHONPATH": str(root)}
    run = {"env": environment, "capture_output": True, "text": True}
    done = subprocess.run([*command, tmp_path / "d"], **run)
    assert done.returncode == 0 and "40 documents, weight 1, uint16" in done.stdout
    done = subprocess.run([*command, tmp_path / "none"], **run)
    assert done.returncode == 2
    assert (
        done.stderr.startswith("error: data.paths: no such file") and done.stderr.count("\n") == 1
    )


PEAK = """
import resource, sys, time
from inl_jax.config import DataConfig
from inl_jax.data.corpus import prepare
started = time.monotonic()
data = DataConfig(paths=(sys.argv[1],), tokenizer=sys.argv[2], cache_dir=sys.argv[3])
(source,) = prepare(data).sources
seconds = time.monotonic() - started
size = source.train_bytes + source.validation_bytes
print(f"{size / 1e6:.0f} MB in {seconds:.0f} s, {size / 1e6 / seconds:.1f} MB/s", file=sys.stderr)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # KiB
"""


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:4096"])
def test_memory_does_not_grow_with_the_corpus(tmp_path, tokenizer):
    """1 GB of text: bytes takes seconds, bpe:4096 some minutes. Peak memory below 1 GiB."""
    sources = [file.read_text() for file in corpus._find("stdlib", quiet).files]
    size = number = 0
    with open(tmp_path / "big.txt", "w") as big:
        while size < 10**9:
            text = sources[number % len(sources)].replace("self", f"name{number}")
            size += big.write(f"{number}\n{text}\n")
            number += 1
    command = [sys.executable, "-c", PEAK, tmp_path / "big.txt", tokenizer, tmp_path / "cache"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    peak = int(done.stdout.splitlines()[-1])
    print(f"{tokenizer}: peak {peak / 2**10:.0f} MiB\n{done.stdout}")
    assert peak < 2**20


def test_a_file_named_twice_is_refused(tmp_path):
    """Split by position as a file and by hash in the directory, it would leak into training."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("some text\n" * 50)
    data = DataConfig(
        paths=(str(tmp_path / "texts" / "a.txt"), str(tmp_path / "texts")),
        weights=(0.5, 0.5),
        tokenizer="bytes",
        cache_dir=str(tmp_path / "cache"),
    )
    with pytest.raises(InputError, match="a.txt is in both .*; name it once"):
        prepare(data)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"content": "x"}', "line 2: no column text, .*this one: content"),
        ('{"text": ' + "9" * 5000 + "}", "line 2: invalid JSON"),
        ("[" * 100_000, "line 2: invalid JSON"),
    ],
    ids=["other columns", "endless number", "endless nesting"],
)
def test_a_row_unlike_the_others_is_named(tmp_path, line, message):
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    data = DataConfig(
        paths=(str(tmp_path / "rows.jsonl"),), tokenizer="bytes", cache_dir=str(tmp_path / "cache")
    )
    with pytest.raises(InputError, match=message):
        prepare(data)


def test_broken_links_and_strange_names_do_no_harm(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("some text")
    (folder / "b.txt").symlink_to(folder / "gone.txt")
    cache = tmp_path / "cache"
    (cache / "tmp.mine").mkdir(parents=True)
    data = DataConfig(paths=(str(folder),), tokenizer="bytes", cache_dir=str(cache))
    assert prepare(data).sources[0].documents == 1
    assert (cache / "tmp.mine").exists()
    for bad in ("x" * 400, "~nobody-of-this-name/x"):
        with pytest.raises(InputError, match="data.paths"):
            prepare(dataclasses.replace(data, paths=(bad,)))
    for bad in ("", str(folder / "a.txt"), "~nobody-of-this-name/x"):
        with pytest.raises(InputError, match="data.cache_dir"):
            prepare(dataclasses.replace(data, cache_dir=bad))
