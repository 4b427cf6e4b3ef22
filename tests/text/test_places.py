import os
import socket

import pytest

from inl_jax.config import InputError
from inl_jax.text.places import hub_name, local_path, mode_of, special_kind


def test_local_path_expands_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert str(local_path("~/a b")) == "/home/me/a b"
    with pytest.raises(InputError, match="data.paths: ~nobody-of-this-name/x: "):
        local_path("~nobody-of-this-name/x")


@pytest.mark.parametrize("path", ["a\0b", "x" * 400])
def test_impossible_path_is_one_line(tmp_path, path):
    assert mode_of(tmp_path / "none") is None
    with pytest.raises(InputError, match="^data.paths: '.{,120}; name another path$"):
        mode_of(tmp_path.joinpath(path).relative_to(tmp_path))


def test_special_kind_names_what_is_neither_file_nor_folder(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    (tmp_path / "file").touch()
    expected = {
        "pipe": "a pipe",
        "socket": "a socket",
        "/dev/null": "a device",
        "file": "",
        ".": "",
    }
    assert {name: special_kind(mode_of(tmp_path / name)) for name in expected} == expected


def test_hub_name_takes_an_existing_path_first(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "me@lab").mkdir()
    assert hub_name("hf:~/me@lab") == (f"{tmp_path}/me@lab", "")
    assert hub_name(f"hf:{tmp_path}/me@lab@fr") == (f"{tmp_path}/me@lab", "fr")
    assert hub_name("hf:owner/name@fr") == ("owner/name", "fr")
    assert hub_name("hf:owner/name") == ("owner/name", "")
