import errno
import os

import numpy as np
import pytest

from inl_jax.checks import InputError
from inl_jax.data import token_files
from inl_jax.data.token_files import Tokens

IDS = np.arange(100, dtype=np.uint16)


@pytest.fixture
def file(tmp_path):
    IDS.tofile(tmp_path / "train.bin")
    return tmp_path / "train.bin"


def opened(file):
    return Tokens(file, "uint16", 100)


@pytest.mark.parametrize("span", [(0, 5), (95, 200), (7, 7), (9, 3), (100, 101), (None, None)])
def test_tokens_are_read_as_slices_of_an_array(file, span):
    tokens = opened(file)
    found = tokens[slice(*span)]
    np.testing.assert_array_equal(found, IDS[slice(*span)])
    assert found.dtype == np.uint16 and len(tokens) == 100


def test_file_that_is_removed_or_replaced_stays_readable(file, tmp_path):
    tokens = opened(file)
    (tmp_path / "other").write_bytes(b"other")
    os.replace(tmp_path / "other", file)
    np.testing.assert_array_equal(tokens[:], IDS)
    file.unlink()
    np.testing.assert_array_equal(tokens[3:9], IDS[3:9])


def test_file_that_is_cut_short_is_named(file):
    tokens = opened(file)
    os.truncate(file, 21)
    np.testing.assert_array_equal(tokens[:10], IDS[:10])
    with pytest.raises(InputError, match=r"train\.bin: was cut short to 10 of 100 tokens; start"):
        tokens[5:15]


def test_id_beyond_the_vocabulary_is_named_with_its_place(file):
    damaged = IDS.copy()
    damaged[42] = 299
    damaged.tofile(file)
    tokens = opened(file)
    np.testing.assert_array_equal(tokens[:42], IDS[:42])
    with pytest.raises(InputError, match=r"train\.bin, token 42: id 299, and .* has 100 ids"):
        tokens[40:50]


def test_read_error_is_named(file, monkeypatch):
    tokens = opened(file)

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(token_files.os, "pread", fail)
    with pytest.raises(InputError, match=r"train\.bin, token 5: Input/output error"):
        tokens[5:6]


def test_file_that_is_written_to_is_said_once(file, said):
    tokens = opened(file)
    with open(file, "r+b") as handle:
        handle.write(b"\x01\x00")
    os.utime(file, (1, 1))
    for _ in range(3):
        tokens[:5]
    assert said == [f"WARNING: {file}: was written to after it was verified"]


def test_files_are_closed_with_their_tokens(file):
    handles = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        opened(file)
    assert len(os.listdir("/proc/self/fd")) == handles
