import bz2
import gzip
import io
import lzma
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from inl_jax.config import InputError
from inl_jax.text import sniff as module
from inl_jax.text.sniff import HEAD_BYTES, NotText, sniff, suffixes, unpacked

ROW = b'{"text": "hello"}\n'


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def in_memory(write):
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def arrow(maker):
    batch = pa.record_batch({"text": ["hello"]})

    def write(buffer):
        with maker(buffer, batch.schema) as writer:
            writer.write(batch)

    return in_memory(write)


def tar():
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO(b""))
    return buffer.getvalue()


PARQUET = in_memory(lambda buffer: parquet.write_table(pa.table({"text": ["hello"]}), buffer))
KINDS = {
    "a.txt": (b"hello\n", "text", ""),
    "empty.jsonl.gz": (b"", "jsonl", ""),
    "latin.txt": ("le café du coin, et tout le monde y venait\n".encode("latin1"), "text", ""),
    "colours.log": (b"\x1b[31mred\x1b[0m\n", "text", ""),
    "README": (b"[![a badge](https://b)]\n", "text", ""),
    "a.py": (b'{"key": 1,\n "other": 2}\n', "text", ""),
    "mark.jsonl": (b"\xef\xbb\xbf" + ROW, "jsonl", ""),
    "a.ndjson": (ROW * 2, "jsonl", ""),
    "lines.json": (ROW * 2, "jsonl", ""),
    "long.json": (b'{"text": "' + b"a" * HEAD_BYTES + b'"}', "jsonl", ""),
    "part-00000": (ROW * 2, "jsonl", ""),
    "dump.txt": (ROW * 2, "jsonl", ""),
    "array.json": (b'[\n {"text": "a"}\n]', "json", ""),
    "array": (b'[{"text": "a"}]', "json", ""),
    "A.CSV": (b"id,text\n", "csv", ""),
    "a.tsv": (b"id\ttext\n", "csv", ""),
    "c4.json.gz": (gzip.compress(ROW), "jsonl", "gzip"),
    "a.csv.gz": (gzip.compress(b"id,text\n"), "csv", "gzip"),
    "a.txt.gz": (gzip.compress(b"hello"), "text", "gzip"),
    "a.jsonl.zst": (zstd(ROW), "jsonl", "zstd"),
    "a.txt.zst": (zstd(b"hello"), "text", "zstd"),
    "a.jsonl.xz": (lzma.compress(ROW), "jsonl", "xz"),
    "a.json.bz2": (bz2.compress(ROW), "jsonl", "bzip2"),
    "a.parquet": (PARQUET, "parquet", ""),
    "0af3": (PARQUET, "parquet", ""),
    "a.feather": (arrow(pa.ipc.new_file), "arrow", ""),
    "a.arrow": (arrow(pa.ipc.new_stream), "arrow", ""),
}


@pytest.mark.parametrize("name", KINDS)
def test_kind_is_told_by_the_first_bytes(tmp_path, name):
    content, *kind = KINDS[name]
    (tmp_path / name).write_bytes(content)
    assert sniff(tmp_path / name) == tuple(kind)


NOISE = np.random.default_rng(0).integers(1, 256, 9000, np.uint8).tobytes()
WORDS = "天地玄黄 привет\n" * 9
REFUSED = {
    "a.tgz": (gzip.compress(tar()), "a tar archive; unpack it"),
    "a.tar.gz": (gzip.compress(tar()), "a tar archive; unpack it"),
    "data.gz": (gzip.compress(tar()), "a tar archive; unpack it"),
    "a.npz": (in_memory(lambda f: np.savez(f, np.arange(3))), "an archive; unpack it"),
    "a.docx": (in_memory(lambda f: zipfile.ZipFile(f, "w").close()), "an archive; unpack it"),
    "a.npy": (in_memory(lambda f: np.save(f, np.arange(3))), "a NumPy array"),
    "a.pkl": (b"\x80\x04]\x94K\x01a.", "a database or a pickle"),
    "a.png": (b"\x89PNG\r\n\x1a\n\0", "an image"),
    "a.pdf": (b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n" + NOISE, "a PDF or Office document"),
    "a.safetensors": (b"\x40" + bytes(7) + b'{"a":0}', "safetensors"),
    "a.bin": (b"\x7fELF\2\1\1", "a program"),
    "a.lz4": (b"\x04\x22\x4d\x18abc", "packed by lz4 or compress; unpack it"),
    "pointer.csv": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS.*git lfs pull"),
    "mark.txt": (WORDS.encode("utf-16"), "text in UTF-16; convert it: iconv -f UTF-16 -t UTF-8"),
    "ascii.jsonl": (ROW.decode().encode("utf-16-le"), "text in UTF-16LE; convert it"),
    "big.txt": (b"".join(b"\0%c" % c for c in ROW), "text in UTF-16BE; convert it"),
    "wide.txt": (ROW.decode().encode("utf-32"), "text in UTF-32; convert it"),
    "no_mark.txt": (WORDS.encode("utf-16-le"), "binary data, or text in UTF-16"),
    "mail.txt": ("天地玄黄\n".encode("iso-2022-jp"), "text in ISO-2022-JP; convert it"),
    "gbk.txt": ("天地玄黄\n".encode("gbk"), "not UTF-8 text .*; leave it out, or convert it"),
    "noise.txt": (NOISE, "not UTF-8 text"),
    "controls": (bytes(range(1, 32)), "not UTF-8 text"),
    "pointer.jsonl.gz": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    "annexed.txt": (b"/annex/objects/MD5E-s1--0.txt\n", "git-annex, not the data"),
    "page.jsonl": (b"<!DOCTYPE html>", "a web page, not rows; download it again"),
    "page.csv": (b"<html>\n<p>\n", "a web page, not rows"),
    "a.ipynb": (b'{\n "cells": []\n}', "a notebook; convert it"),
    "page.parquet": (b"<!DOCTYPE html>", "damaged, or not parquet; copy it again"),
    "empty.parquet": (b"", "damaged, or not parquet"),
    "a.parquet.gz": (gzip.compress(PARQUET), "parquet packed by gzip; unpack it"),
    "twice.gz": (gzip.compress(gzip.compress(b"hello")), "a packed file packed by gzip"),
    "package.json": (b'{\n "name": "x"\n}', "JSON, but no rows; write an object a line"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_holds_no_text_is_refused_by_what_it_is(tmp_path, name):
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(NotText, match=message) as caught:
        sniff(tmp_path / name)
    assert f"{name}: {caught.value.found}; " in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "better"),
    [
        ("a.jsonl", gzip.compress(ROW), "a.jsonl.gz"),
        ("a.jsonl", zstd(ROW), "a.jsonl.zst"),
        ("a.jsonl.gz", ROW, "a.jsonl"),
        ("a.txt.gz", zstd(b"hello"), "a.txt.gz.zst"),
    ],
    ids=["gzip unsaid", "zstd unsaid", "not packed", "zstd as gzip"],
)
def test_wrong_name_is_answered_with_one_that_works(tmp_path, name, content, better):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(NotText, match=f"name it {better}$"):
        sniff(tmp_path / name)
    assert sniff((tmp_path / name).rename(tmp_path / better)).format != ""


@pytest.mark.parametrize(
    ("packing", "pack"),
    [("gzip", gzip.compress), ("zstd", zstd), ("xz", lzma.compress), ("bzip2", bz2.compress)],
)
def test_unpacked_bytes_are_whole_or_an_error(tmp_path, packing, pack):
    content = NOISE * 20
    file = tmp_path / "a"
    file.write_bytes(pack(content) + pack(b"more"))
    with unpacked(file, packing) as stream:
        assert stream.read() == content + b"more"
    file.write_bytes(pack(content)[:-9])
    with unpacked(file, packing) as stream, pytest.raises(InputError, match=f"damaged {packing}"):
        stream.read()


def test_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module, "open", refuse, raising=False)
    with pytest.raises(InputError, match="a.txt: Permission denied; name a file"):
        sniff(tmp_path / "a.txt")


def test_suffixes_are_the_format_and_the_packing(tmp_path):
    assert suffixes(tmp_path / "a.JSON.GZ") == (".json", "gzip")
    assert suffixes(tmp_path / "b.c" / "a") == ("", "")
    assert suffixes(tmp_path / "a.txt") == (".txt", "")
