import json
import math
import os
import stat
from pathlib import Path

import pytest

from inl_jax import files
from inl_jax.checks import InputError
from inl_jax.config import DataConfig, TrainConfig
from inl_jax.files import append_lines, json_text, read_bytes, read_json, user_path, write_text


@pytest.mark.parametrize(
    "given", ["a b", "日本/é", "a\nb", "/x/../y", "./~", "-", "x" * 255, Path("runs/a")]
)
def test_user_path_takes_any_name_that_a_file_may_have(given):
    assert user_path(given, "run_dir") == Path(given)


@pytest.mark.parametrize("given", ["~", "~/runs/x"])
def test_user_path_expands_the_home_directory(given, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path(given, "run_dir") == Path(given.replace("~", str(tmp_path)))
    config = TrainConfig(run_dir=given, init_from=given)
    assert config.run_dir == config.init_from == str(user_path(given, "run_dir"))


@pytest.mark.parametrize(
    "given, why",
    [
        ("a\0b", "NUL"),
        ("a/\udce9", "not UTF-8"),
        (os.fsdecode(b"caf\xe9"), "not UTF-8"),
        ("x" * 256, "too long"),
        ("é" * 128, "too long"),
        ("x/" * 2000, "too long"),
        ("~nobody-is-called-so/x", "no such home"),
        ("", "empty"),
        (b"runs/x", "must be a path"),
        (None, "must be a path"),
        (3, "must be a path"),
    ],
)
def test_user_path_refuses_in_one_line_what_no_file_can_be_called(given, why):
    with pytest.raises(InputError, match=why) as caught:
        user_path(given, "--out")
    assert str(caught.value).startswith("--out") and str(caught.value).isprintable()
    for fields in ({"run_dir": given}, {"init_from": given}) if given else ():
        with pytest.raises(InputError, match=next(iter(fields))):
            TrainConfig(**fields)


def test_cache_dir_is_checked_before_anything_is_computed():
    with pytest.raises(InputError, match="data.cache_dir"):
        DataConfig(cache_dir="a\0b")
    assert DataConfig(cache_dir="~/x").cache_dir == "~/x"  # recorded for any machine


def test_user_path_says_that_the_working_directory_is_gone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    with pytest.raises(InputError, match="working directory"):
        user_path("runs/a", "run_dir")
    assert user_path("/runs/a", "run_dir") == Path("/runs/a")


def test_json_text_is_json_whatever_the_numbers():
    value = {"a": [math.nan, (1.5, -math.inf)], "b": {"c": math.inf, "d": None}, "e": "\ud800é"}
    text = json_text(value)
    expected = {"a": [None, [1.5, None]], "b": {"c": None, "d": None}, "e": "\ud800é"}
    assert json.loads(text, parse_constant=pytest.fail) == expected and text.isascii()


def test_append_lines_keeps_lines_whole(tmp_path):
    path = tmp_path / "log"
    append_lines(path, "one\n")
    with open(path, "a") as file:
        file.write("tw")  # as a crash leaves it
    append_lines(path, "three\nfour\n")
    assert path.read_text() == "one\ntw\nthree\nfour\n"


def test_append_lines_leaves_nothing_of_a_line_that_the_disk_has_no_room_for(tmp_path, monkeypatch):
    path, write = tmp_path / "log", os.write
    append_lines(path, "one\n")

    def full(handle, data):
        if len(data) < 20:
            raise OSError(28, "No space left on device")
        return write(handle, data[:10])

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "write", full)
        with pytest.raises(OSError, match="No space"):
            append_lines(path, "a line of more than twenty bytes\n")
    assert path.read_text() == "one\n"
    append_lines(path, "two\n")
    assert path.read_text() == "one\ntwo\n"


def not_a_file(path, kind):
    """Puts something else where a file is expected."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/full")
    else:
        path.symlink_to(path.parent / "nowhere" / "file")


@pytest.mark.parametrize("kind", ["pipe", "directory", "device", "dangling link"])
def test_what_is_no_file_is_an_error_and_never_blocks(tmp_path, kind):
    path = tmp_path / "log"
    not_a_file(path, kind)
    with pytest.raises(OSError):
        append_lines(path, "one\n")
    with pytest.raises(OSError):
        read_bytes(path)
    assert read_json(path) == {}


def test_write_text_replaces_a_file_of_any_name_and_escapes_what_is_not_utf8(tmp_path):
    path = tmp_path / ("é" * 127)
    os.mkfifo(path)  # which nobody reads
    write_text(path, "a \udcff")
    assert path.read_text() == "a \\udcff" and stat.S_ISREG(path.stat().st_mode)
    assert list(tmp_path.iterdir()) == [path]


def test_remove_unfinished_takes_only_what_a_killed_write_left(tmp_path):
    for name in ("config.json", ".config.json.123", ".hidden", ".a.txt", "b.456"):
        (tmp_path / name).touch()
    files.remove_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        ".hidden",
        ".a.txt",
        "b.456",
    }
