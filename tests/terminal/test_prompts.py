import io
import os

import pytest

from inl_jax.config import InputError
from inl_jax.terminal.prompts import read_prompts


@pytest.fixture
def piped(monkeypatch):
    """Makes stdin a pipe that holds these bytes."""

    def pipe(data):
        reading, writing = os.pipe()
        os.write(writing, data)
        os.close(writing)
        monkeypatch.setattr("sys.stdin", open(reading))

    return pipe


def test_read_prompts_takes_texts_then_whole_files(tmp_path):
    (tmp_path / "a").write_text("one\ntwo\n")
    (tmp_path / "b").write_bytes("\ufeffé".encode())  # with a byte order mark
    found = read_prompts(["x", ""], [tmp_path / "a", tmp_path / "b"])
    assert found == ["x", "", "one\ntwo\n", "é"]


def test_read_prompts_reads_a_pipe_once(piped):
    piped("é\nb\n".encode())
    assert read_prompts([], []) == ["é\nb\n"]
    piped(b"one")
    assert read_prompts(["a", "-"], []) == ["a", "one"]
    piped(b"unread")
    assert read_prompts(["a"], []) == ["a"]
    with pytest.raises(InputError, match="stdin can be read once"):
        read_prompts(["-", "-"], [])


@pytest.mark.parametrize("stdin", [None, io.StringIO("not of the system")])
def test_read_prompts_begins_a_document_if_nothing_is_piped_in(monkeypatch, stdin):
    monkeypatch.setattr("sys.stdin", stdin)
    assert read_prompts([], []) == [""]


def test_read_prompts_names_a_closed_stdin(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(InputError, match="--prompt -: stdin is closed"):
        read_prompts(["-"], [])


def test_read_prompts_names_what_cannot_be_read(tmp_path, piped):
    (tmp_path / "bad").write_bytes(b"ab\xff")
    for file, named in ((tmp_path / "bad", "byte 2"), (tmp_path, "directory"), ("x", "No such")):
        with pytest.raises(InputError, match=named):
            read_prompts([], [tmp_path / file])
    piped(b"\xff")
    with pytest.raises(InputError, match="stdin: is not UTF-8"):
        read_prompts([], [])
