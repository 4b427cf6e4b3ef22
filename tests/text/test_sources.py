import dataclasses
import gzip
import json
import os
import re
import sys

import pyarrow as pa
import pytest
from pyarrow import parquet
from texts import DOCUMENTS, GPT2, leftovers, split_texts, write_files, write_jsonl

from inl_jax.config import DataConfig, InputError
from inl_jax.data.corpus import prepare
from inl_jax.text.sources import find_entries


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


def test_every_source_kind_gives_the_same_tokens(make_corpus, tmp_path):
    kinds = write_every_kind(tmp_path)
    made = [make_corpus(kind, using=GPT2) for kind in kinds]
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


def test_directory_gives_files_of_text_in_order_and_names_the_skipped(make_corpus, tmp_path, said):
    for name in ("b.txt", "a/z.md", "a/b/c.py", ".git/config.txt", "a/.hidden.txt", "a/x.png"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_text(name)
    (tmp_path / "d" / "a" / "x.png").write_bytes(b"\x89PNG\r\n")
    write_jsonl(tmp_path / "d" / "a" / "r.jsonl", ["row"])
    (source,) = make_corpus(tmp_path / "d", validation_fraction=0).sources
    assert split_texts(source, "train") == ["b.txt", "row", "a/z.md", "a/b/c.py"]
    assert "skipped 1 file: 1 .png (an image)" in said[0]


def test_stdlib_is_the_library_without_its_tests_and_other_packages(make_corpus):
    (source,) = make_corpus("stdlib", max_documents=30).sources
    assert source.documents == 30
    (entry,) = find_entries(["stdlib"], DataConfig())
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
        ({"text": "no", "Body": "t"}, "Body", "t"),
        ({"text": "no", "Body": "t"}, "body", "t"),
    ],
)
def test_text_columns_are_found_by_name(make_corpus, tmp_path, row, column, text):
    empty = [dict.fromkeys(row), dict.fromkeys(row, "")]
    lines = "\n\n".join(json.dumps(r) for r in [*empty, row])
    (tmp_path / "a.jsonl").write_text(lines)
    table = pa.Table.from_pylist([{k: v or "" for k, v in row.items()}])
    parquet.write_table(table, tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        (source,) = make_corpus(tmp_path / name, column=column, validation_fraction=0).sources
        assert split_texts(source, "train") == [text]
        assert source.documents == 1


def test_column_that_does_not_exist_is_named(make_corpus, tmp_path):
    with pytest.raises(InputError, match="no column body; set data.column to one of: text"):
        make_corpus(write_jsonl(tmp_path / "a.jsonl"), column="body")


def test_order_of_files_is_fixed(make_corpus, tmp_path, monkeypatch):
    folder = write_files(tmp_path / "d")
    first = make_corpus(folder)
    real = os.walk

    def reversed_walk(root, **options):
        return ((folder, names, files[::-1]) for folder, names, files in real(root, **options))

    monkeypatch.setattr(os, "walk", reversed_walk)
    assert make_corpus(folder).sources == first.sources


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


def names(spec, **fields):
    (entry,) = find_entries([str(spec)], DataConfig(**fields))
    assert len(entry.kinds) == len(entry.files)
    return [file.name for file in entry.files]


def test_file_of_two_names_is_read_once_in_an_entry_and_refused_in_two(tmp_path):
    folder = write_files(tmp_path / "d", ["a", "b"])
    (folder / "latest.txt").symlink_to("001.txt")
    (folder / "other.txt").hardlink_to(folder / "000.txt")
    assert names(folder) == names(folder / "*.txt") == ["000.txt", "001.txt"]
    with pytest.raises(InputError, match="name it once"):
        find_entries([str(folder / "000.txt"), str(folder / "other.txt")], DataConfig())


def test_identity_tells_two_readings_of_one_file_apart(tmp_path):
    for name in ("a.txt", "a.csv"):
        (tmp_path / name).symlink_to(write(tmp_path / "data", b"id,text\n1,a\n"))
    text, table = (
        find_entries([str(tmp_path / name)], DataConfig())[0] for name in ("a.txt", "a.csv")
    )
    assert text.identity()[1] == table.identity()[1]
    assert json.dumps(text.identity()) != json.dumps(table.identity())


def test_existing_path_comes_before_a_pattern(tmp_path):
    folder = write_files(tmp_path / "my däta [v1]", ["a", "b"])
    (folder / "c[1].txt").write_text("c")
    (folder / "c1.txt").write_text("d")
    assert names(folder / "c[1].txt") == ["c[1].txt"]
    assert names(folder / "00?.txt") == ["000.txt", "001.txt"]
    assert names(folder / "c[0-9].*") == ["c1.txt"]
    with pytest.raises(InputError, match=r"no file matches .*write \[\[\] for a bracket"):
        names(folder / "c[1]*.none")
    assert names(folder / "c[[]1]*") == ["c[1].txt"]


def test_glob_names_each_file_once_and_says_that_it_names_other_splits(tmp_path, said):
    write_jsonl(write_files(tmp_path / "d" / "data", ["a"]) / "train.jsonl")
    write_jsonl(tmp_path / "d" / "data" / "test.jsonl")
    assert names(tmp_path / "d" / "**" / "*") == ["000.txt", "test.jsonl", "train.jsonl"]
    assert "also names 1 file of other splits" in said[0] and len(said) == 1
    assert names(tmp_path / "d" / "*") == ["000.txt", "train.jsonl"]


def test_folder_that_a_glob_may_not_read_is_named(tmp_path, monkeypatch):
    write_files(tmp_path / "d" / "inner")
    real = os.scandir

    def scandir(folder):
        if str(folder).endswith("inner"):
            raise PermissionError(13, "Permission denied", str(folder))
        return real(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    for spec in (tmp_path / "d", tmp_path / "d" / "**" / "*.txt"):
        with pytest.raises(InputError, match="inner: Permission denied; name a folder that you"):
            names(spec)


def test_file_without_text_is_refused_alone_and_by_a_glob(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "gone.txt").symlink_to("none")
    for name, message in {
        "a.png": "a.png: an image",
        "pipe.txt": "pipe.txt is a pipe, not a regular file; write it to a file first",
        "gone.txt": "no such file or directory|gone.txt is a broken link",
    }.items():
        for spec in (name, f"{name[:2]}*"):
            with pytest.raises(InputError, match=message):
                names(tmp_path / spec)


def test_file_named_twice_is_refused(tmp_path):
    """A file is split by position, in a directory by hash: validation text would be trained on."""
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


def test_missing_packages_are_named(make_corpus, tmp_path, monkeypatch):
    for package, path in (
        ("pyarrow", write_parquet(tmp_path / "a.parquet", text=["a"])),
        ("datasets", "hf:owner/name"),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(InputError, match=rf"needs {package}; pip install 'inl_jax\[data\]'"):
            make_corpus(path)


def damage(file, keep):
    file.write_bytes(file.read_bytes()[:keep])
    return file


def write(file, content):
    file.write_bytes(content)
    return file


def write_parquet(file, **columns):
    parquet.write_table(pa.table(columns), file)
    return file


def write_hub(folder):
    (folder / "hub").mkdir()
    write_jsonl(folder / "hub" / "test.jsonl")
    return f"hf:{folder / 'hub'}"


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
    "packed": (lambda d: write(d / "a.zip", b"PK\3\4"), "a.zip: an archive; unpack it"),
    "parquet": (lambda d: write(d / "a.parquet", b"no"), "a.parquet: damaged, or not parquet"),
    "cut parquet": (
        lambda d: damage(write_parquet(d / "b.parquet", text=DOCUMENTS), 500),
        "b.parquet: damaged, or not parquet",
    ),
    "cut gzip": (
        lambda d: damage(write_jsonl(d / "a.jsonl.gz", opener=gzip.open), 300),
        "a.jsonl.gz: damaged gzip",
    ),
    "no gzip": (lambda d: write(d / "a.jsonl.gz", ROW), "a.jsonl.gz: holds no gzip"),
    "json": (lambda d: write(d / "a.jsonl", ROW + b"\n{oops\n"), "a.jsonl line 3: invalid JSON"),
    "list": (
        lambda d: write(d / "a.jsonl", ROW + b"[1]"),
        "a.jsonl line 2: holds a list; write one JSON object a line",
    ),
    "number": (
        lambda d: write(d / "a.jsonl", b'{"text": 1}'),
        "line 1: column text holds a number",
    ),
    "column": (
        lambda d: write(d / "a.jsonl", b'{"id": "a", "body": "b"}'),
        "line 1: no text column; set data.column to one of: id, body",
    ),
    "parquet column": (
        lambda d: write_parquet(d / "c.parquet", id=[1], body=["b"]),
        "c.parquet row 1: no text column; set data.column to one of: body",
    ),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_mistakes_are_one_line_and_leave_nothing(make_corpus, tmp_path, kind):
    (tmp_path / "given").mkdir()
    build, complaint = ERRORS[kind]
    path = build(tmp_path / "given")
    with pytest.raises(InputError, match=complaint) as caught:
        make_corpus(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists() or leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x"}', "line 2: no column text, .*this one: body"),
        ('{"text": ' + "9" * 5000 + "}", "line 2: invalid JSON"),
        ("[" * 100_000, "line 2: invalid JSON"),
    ],
    ids=["other columns", "endless number", "endless nesting"],
)
def test_row_unlike_the_others_is_named(tmp_path, line, message):
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    data = DataConfig(
        paths=(str(tmp_path / "rows.jsonl"),), tokenizer="bytes", cache_dir=str(tmp_path / "cache")
    )
    with pytest.raises(InputError, match=message):
        prepare(data)
