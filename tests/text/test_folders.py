import gzip
import os

import pyarrow as pa
import pytest
from pyarrow import parquet

from inl_jax.config import DataConfig, InputError
from inl_jax.text.folders import text_files, walk
from inl_jax.text.sniff import HEAD_BYTES, sniff

ROW = b'{"text": "a"}\n'
CARD = b"---\nlicense: mit\n---\n# Card\n"
LONG_ROWS = b'{"text": "' + b"a" * HEAD_BYTES + b'"}\n'
PNG = b"\x89PNG\r\n\x1a\n\0"
ALPACA = b'[{"instruction": "a", "output": "b"}]'


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def names(folder, **fields):
    return [str(file.relative_to(folder)) for file in text_files(folder, DataConfig(**fields))]


def test_folder_reads_a_file_as_if_it_were_named_alone(tmp_path):
    parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    files = {"a.txt": b"a", "b": b"b", "c.json": ROW, "d.csv": b"text\na\n", "e.jsonl": ROW}
    files |= {f"packed_{name}.gz": gzip.compress(content) for name, content in files.items()}
    found = text_files(write(tmp_path, files), DataConfig())
    assert len(found) == 11 and found == {file: sniff(file) for file in found}


SOURCE_TREE = {
    "Makefile": b"all:\n",
    "README.md": b"# Code\n",
    "package.json": b'{\n "name": "x"\n}',
    "src/test.py": b"assert True\n",
    "src/train.py": b"pass\n",
    "src/users.json": b'[{"name": "x"}]',
    "table.csv": b"a,b\n1,2\n",
    "x.png": PNG,
}


def test_source_tree_is_text_but_for_its_json_tables_and_pictures(tmp_path, said):
    folder = write(tmp_path, SOURCE_TREE)
    assert names(folder) == ["Makefile", "README.md", "src/test.py", "src/train.py"]
    (line,) = said
    assert "skipped 4 files: " in line
    for part in ("1 .json (JSON, but no rows)", "1 .csv (no text column)", "1 .png (an image)"):
        assert part in line


FOLDERS = {
    "card and shards": (
        {"README.md": CARD, "load.py": b"import a", "data/train-0.csv": b"text\na\n"},
        ["data/train-0.csv"],
        ["what describes the data: README.md, load.py"],
    ),
    "card and text": ({"README.md": CARD, "corpus.txt": b"a"}, ["corpus.txt"], ["README.md"]),
    "packed shards": (
        {"README.md": b"# C4", "c4-train.0.json.gz": gzip.compress(ROW), "LICENSE": b"free"},
        ["c4-train.0.json.gz"],
        ["what describes the data: LICENSE, README.md"],
    ),
    "splits": (
        {"README": b"x", "train.jsonl": ROW, "test.jsonl": ROW, "valid.csv": b"text\na\n"},
        ["train.jsonl"],
        ["other splits (test, validation): test.jsonl, valid.csv", "describes the data: README"],
    ),
    "another split is a pointer": (
        {"train.jsonl": ROW, "test.parquet": b"version https://git-lfs"},
        ["train.jsonl"],
        ["other splits (test): test.parquet"],
    ),
    "shards of Spark": (
        {"_SUCCESS": b"", "README": b"x", "part-0": ROW * 2},
        ["part-0"],
        ["README"],
    ),
    "what downloads and editors leave": (
        {"a.txt": b"a", "a.txt.part": b"b", "a.txt~": b"c", "MD5SUMS": b"d", "b.jsonl.md5": b"e"},
        ["a.txt"],
        ["skipped 4 files: "],
    ),
    "results of map": (
        {"x-train.txt": b"a", "cache-0123456789abcdef.arrow": b"b"},
        ["x-train.txt"],
        ["skipped 1 file: 1 .arrow"],
    ),
    "packed beside unpacked": (
        {"a.jsonl": ROW, "a.jsonl.gz": gzip.compress(ROW)},
        ["a.jsonl"],
        ["skipped 1 file: 1 .gz (packed, beside the same unpacked)"],
    ),
    "empty shards": (
        {"a.jsonl": ROW, "b.jsonl": b"", "c.jsonl.gz": b""},
        ["a.jsonl"],
        ["skipped 2 files: 1 .jsonl (empty), 1 .gz (empty)"],
    ),
    "missing shards": (
        {"en-00000-of-00003.jsonl": ROW, "en-00002-of-00003.jsonl": ROW, "de-0-of-1.jsonl": ROW},
        None,
        ["holds 2 of 3 files en-*.jsonl; copy the others"],
    ),
    "text and rows": ({"README.md": b"x", "a.md": b"b", "b.jsonl": ROW}, None, []),
    "a README alone": ({"README.md": b"x"}, None, []),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folder_leaves_out_what_is_no_training_text_and_says_so(tmp_path, said, kind):
    files, expected, lines = FOLDERS[kind]
    assert names(write(tmp_path, files)) == (expected or sorted(files))
    assert len(said) == len(lines)
    for line, part in zip(said, lines, strict=True):
        assert part in line


REFUSED = {
    "no text": ({"a.png": PNG}, "holds no text to train on; .*a.png: an image"),
    "empty": ({"a.txt": b""}, "holds no text; name a file or folder"),
    "shards that cannot be read": (
        {"README.md": b"# x", "0.png": PNG},
        "holds no text to train on; .*0.png: an image",
    ),
    "no column": (
        {"README.md": b"# x", "a.json.gz": gzip.compress(b'{"raw": "b"}\n')},
        "a.json.gz: no text column; set data.column to one of: raw",
    ),
    "parts": ({"README.md": b"# x", "alpaca.json": ALPACA}, "the text is in parts"),
    "split": (
        {"README.md": CARD, "test.jsonl": ROW, "dev.jsonl": ROW},
        "holds no text of split train; set data.hf_split to one of: test, validation",
    ),
    "damaged rows": ({"a.txt": b"a", "b.jsonl": ROW.decode().encode("utf-16")}, "UTF-16"),
    "pointer": ({"a.txt": b"a", "b.parquet": b"version https://git-lfs"}, "run: git lfs pull"),
    "cut": ({"a.txt": b"a", "b.gz": gzip.compress(ROW)[:20]}, "b.gz: damaged gzip"),
    "cut late": (
        {"a.txt": b"a", "b.json.gz": gzip.compress(LONG_ROWS)[:-9]},
        "b.json.gz: damaged gzip",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_folder_is_refused_rather_than_read_without_its_data(tmp_path, kind):
    files, message = REFUSED[kind]
    with pytest.raises(InputError, match=message):
        names(write(tmp_path, files))


def test_advice_about_a_column_and_a_split_works(tmp_path):
    folder = write(tmp_path, {"README.md": b"# x", "test.json": b'{"raw": "b"}\n'})
    assert names(folder, column="raw", hf_split="test") == ["test.json"]


def test_links_pipes_and_unread_folders_are_skipped_and_counted(tmp_path, said):
    folder = write(tmp_path / "a", {"a.txt": b"a", ".hidden.txt": b"b"})
    os.mkfifo(folder / "pipe")
    (folder / "gone.txt").symlink_to("none")
    (folder / "other").symlink_to(write(tmp_path / "b", {"b.txt": b"b"}))
    assert names(folder) == ["a.txt"]
    for part in ("(a pipe)", "(a broken link)", "(a link to a folder)", "skipped 3 files"):
        assert part in said[0]


def test_cache_of_the_hub_is_read_by_the_names_of_its_files(tmp_path):
    write(tmp_path, {"blobs/0af3": ROW, "blobs/1b5d": ROW, "refs/main": b"c0ffee"})
    data = tmp_path / "snapshots" / "c0ffee" / "data"
    data.mkdir(parents=True)
    for name, blob in (("train.jsonl", "0af3"), ("test.jsonl", "1b5d")):
        (data / name).symlink_to(tmp_path / "blobs" / blob)
    assert names(tmp_path) == ["snapshots/c0ffee/data/train.jsonl"]


def test_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=f"{tmp_path}: Permission denied; name a folder"):
        list(walk(tmp_path))


def test_card_that_names_splits_by_itself_is_left_to_datasets(make_corpus, tmp_path):
    """The names of the files do not tell: the advice reads the split that is asked for."""
    (tmp_path / "a.jsonl").write_text('{"text": "train one"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "held out"}\n')
    card = "- split: train\n    path: a.jsonl\n  - split: test\n    path: b.jsonl\n"
    head = f"configs:\n- config_name: default\n  data_files:\n  {card}"
    (tmp_path / "README.md").write_text(f"---\n{head}---\n# A card\n")
    with pytest.raises(InputError, match="its card names the splits; write hf:") as caught:
        make_corpus(tmp_path)
    advice = str(caught.value).split("write ")[1]
    assert make_corpus(advice, validation_fraction=0).sources[0].train_bytes == len("train one")
