import io
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from texts import BYTES, DOCUMENTS, leftovers, split_texts, write_files

from inl_jax.config import InputError
from inl_jax.data import cache, corpus, token_files
from inl_jax.failures import DiskFull
from inl_jax.tokens.tokenizer import Tokenizer


def forbid_encoding(monkeypatch):
    def refuse(self, texts):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(Tokenizer, "encode_batch", refuse)


def test_second_call_uses_the_cache(make_corpus, tmp_path, monkeypatch, said):
    folder = write_files(tmp_path / "d")
    first = make_corpus(folder, tokenizer="bpe:270")
    forbid_encoding(monkeypatch)
    monkeypatch.setattr(corpus.tokenizers, "train_bpe", None)
    said.clear()
    again = make_corpus(folder, tokenizer="bpe:270")
    assert again.sources == first.sources and again.fingerprint == first.fingerprint
    assert "from the cache" in said[0]


def test_every_change_gives_another_directory(make_corpus, tmp_path):
    folder = write_files(tmp_path / "d")
    changes = [
        {},
        {"tokenizer": "gpt2"},
        {"validation_fraction": 0.4},
        {"max_documents": 39},
        {"bad_utf8": "error"},
        {"tokenizer": "bpe:258"},
    ]
    directories = {make_corpus(folder, **change).sources[0].directory for change in changes}
    os.utime(folder / "003.txt", (1, 1))
    directories.add(make_corpus(folder).sources[0].directory)
    (folder / "new.txt").write_text("new")
    directories.add(make_corpus(folder).sources[0].directory)
    assert len(directories) == len(changes) + 2


def test_interruption_leaves_nothing_that_looks_finished(make_corpus, tmp_path, monkeypatch):
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
        make_corpus(folder)
    assert leftovers(tmp_path) == []
    (source,) = make_corpus(folder).sources
    assert leftovers(tmp_path) == [source.directory.name]
    assert source.documents == len(DOCUMENTS)


SLOW_WRITER = """
import sys, time
from inl_jax.config import DataConfig
from inl_jax.data import corpus
from inl_jax.tokens.tokenizer import Tokenizer
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


def test_killed_writer_leaves_nothing_that_looks_finished(make_corpus, tmp_path):
    folder, cache = write_files(tmp_path / "d"), tmp_path / "cache"
    writer = start_writer(folder, cache, 5)
    deadline = time.monotonic() + 30
    while not list(cache.glob("tmp.*/train.bin")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (source,) = make_corpus(folder).sources  # beside a living writer, whose files stay
    assert list(cache.glob("tmp.*"))
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    (again,) = make_corpus(folder).sources
    assert again == source
    assert leftovers(tmp_path) == [source.directory.name]


def test_two_processes_at_once_make_the_same(tmp_path):
    folder, cache = write_files(tmp_path / "d"), tmp_path / "cache"
    writers = [start_writer(folder, cache, 0.01) for _ in range(2)]
    printed = [writer.communicate()[0].splitlines()[-1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0]
    assert printed[0] == printed[1]
    assert len(leftovers(tmp_path)) == 1


def test_many_threads_at_once_make_the_same(make_corpus, tmp_path):
    folder = write_files(tmp_path / "d")
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: make_corpus(folder, tokenizer="bpe:270"), range(4)))
    assert len({c.fingerprint for c in made}) == 1
    assert len(leftovers(tmp_path)) == 2


@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "meta.json"])
@pytest.mark.parametrize("content", [None, b"", b"odd", b"[]", b"{}"])
def test_damaged_directory_is_made_again(make_corpus, tmp_path, name, content):
    folder = write_files(tmp_path / "d")
    (first,) = make_corpus(folder).sources
    tokens = np.array(first.open("train")[:])
    if content is None:
        (first.directory / name).unlink()
    else:
        (first.directory / name).write_bytes(content)
    (again,) = make_corpus(folder).sources
    np.testing.assert_array_equal(again.open("train")[:], tokens)
    assert again == first


@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "meta.json"])
def test_flipped_bit_is_noticed_and_said(make_corpus, tmp_path, said, name):
    folder = write_files(tmp_path / "d")
    (first,) = make_corpus(folder).sources
    content = bytearray((first.directory / name).read_bytes())
    content[content.index(b"1") if name == "meta.json" else 1000] ^= 2  # a count; a letter
    (first.directory / name).write_bytes(content)
    said.clear()
    assert make_corpus(folder).sources == (first,)
    assert said[0].startswith(f"WARNING: {first.directory}: the tokens there are damaged (")
    assert said[0].endswith("prepared anew") and said[1].startswith("data: 40 documents")


def test_tokens_are_verified_once_per_process(make_corpus, tmp_path, monkeypatch):
    folder = write_files(tmp_path / "d")
    make_corpus(folder)
    (found,) = make_corpus(folder).sources
    monkeypatch.setattr(token_files, "hashlib", None)  # that would read them again
    assert make_corpus(folder).sources == (found,)


def test_other_text_of_the_same_size_and_time_is_other_text(make_corpus, tmp_path):
    file = tmp_path / "a.txt"
    for text in ("one text\n", "two text\n", "six text\n"):
        if text[0] == "t":  # replaced, as by rsync
            (tmp_path / "new").write_text(text)
            os.replace(tmp_path / "new", file)
        else:
            file.write_text(text)
        os.utime(file, (1, 1))
        (source,) = make_corpus(file, validation_fraction=0).sources
        assert split_texts(source, "train") == [text]


def test_cache_that_cannot_be_written_is_named(make_corpus, tmp_path, monkeypatch):
    folder = write_files(tmp_path / "d")
    (first,) = make_corpus(folder).sources

    def refuse(self, *args, **kwargs):
        if self.name.startswith("tmp."):
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError, match=r"data.cache_dir=.*/cache: Permission denied; name one"):
        make_corpus(folder, validation_fraction=0.1)
    assert make_corpus(folder).sources == (first,)  # which may be read


@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "meta.json"])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), PermissionError(13, "denied")])
def test_directory_that_cannot_be_read_is_kept(make_corpus, tmp_path, monkeypatch, name, error):
    folder = write_files(tmp_path / "d")
    (first,) = make_corpus(folder).sources
    kept = {file.name: file.read_bytes() for file in first.directory.iterdir()}

    def failing(real):
        def fail(file, *args, **kwargs):
            if Path(file).name == name:
                raise error
            return real(file, *args, **kwargs)

        return fail

    with monkeypatch.context() as patch:
        patch.setattr("os.open", failing(os.open))
        patch.setattr("io.open", failing(io.open))  # of Path.read_text
        with pytest.raises(InputError, match=f"{first.directory}: .*{error.strerror}") as caught:
            make_corpus(folder)
    assert "\n" not in str(caught.value)
    assert {file.name: file.read_bytes() for file in first.directory.iterdir()} == kept
    forbid_encoding(monkeypatch)
    assert make_corpus(folder).sources == (first,)  # the error was transient


def test_temporary_directories_of_dead_writers_are_removed(tmp_path):
    old, fresh = tmp_path / "tmp.elsewhere.1.abc", tmp_path / "tmp.elsewhere.2.abc"
    for temporary in (old, fresh, tmp_path / "tmp.mine"):
        temporary.mkdir()
    (old / "train.bin").touch()
    for path in (old / "train.bin", old):
        os.utime(path, (1, 1))
    cache.remove_stale(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [fresh.name, "tmp.mine"]


def test_full_disk_leaves_nothing(make_corpus, tmp_path, monkeypatch):
    def full(self, directory):
        raise OSError(28, "No space left on device")

    folder = write_files(tmp_path / "d")
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "save", full)
        with pytest.raises(DiskFull, match=r"/cache: No space left on device, .* are free; make"):
            make_corpus(folder)
    assert leftovers(tmp_path) == []
    make_corpus(folder)


def test_read_finished_names_what_is_no_directory(tmp_path):
    (tmp_path / "key").write_text("a file")
    with pytest.raises(InputError, match="key: is no directory of prepared tokens; remove it"):
        cache.read_finished(tmp_path / "key", BYTES)


def test_remove_may_be_called_by_several_at_once(tmp_path):
    (tmp_path / "key").mkdir()
    (tmp_path / "key/train.bin").write_text("x")
    for _ in range(2):  # the second finds it gone
        cache.remove(tmp_path / "key")
    assert not list(tmp_path.iterdir())
