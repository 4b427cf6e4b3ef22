import bz2
import csv
import gzip
import json
import lzma
import tracemalloc

import pyarrow as pa
import pytest
from pyarrow import feather, parquet
from texts import DOCUMENTS

from inl_jax.config import DataConfig, InputError
from inl_jax.text import rows
from inl_jax.text.rows import file_rows
from inl_jax.text.sniff import sniff


def read(file, **fields):
    return [row for row, _, _ in file_rows(file, sniff(file), DataConfig(**fields))]


def texts(file, **fields):
    return [row["text"] for row in read(file, **fields)]


def write(file, content):
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def write_csv(file, *table, **options):
    with open(file, "w", newline="") as lines:
        csv.writer(lines, **options).writerows(table)
    return file


def write_stream(file, table, rows_per_batch=7):
    with pa.ipc.new_stream(str(file), table.schema) as stream:
        stream.write_table(table, rows_per_batch)
    return file


def lines_of(documents):
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in documents)


TABLE = pa.table({"id": range(len(DOCUMENTS)), "text": DOCUMENTS})
WRITERS = {
    "a.json": lambda f: write(f, json.dumps([{"text": t, "n": [{}]} for t in DOCUMENTS], indent=4)),
    "b.json": lambda f: write(f, lines_of(DOCUMENTS)),
    "a.ndjson": lambda f: write(f, lines_of(DOCUMENTS)),
    "a.json.gz": lambda f: write(f, gzip.compress(lines_of(DOCUMENTS).encode())),
    "a.jsonl.xz": lambda f: write(f, lzma.compress(lines_of(DOCUMENTS).encode())),
    "a.jsonl.bz2": lambda f: write(f, bz2.compress(lines_of(DOCUMENTS).encode())),
    "a.jsonl.zst": lambda f: write(f, pa.compress(lines_of(DOCUMENTS).encode(), "zstd", True)),
    "a.csv": lambda f: write_csv(f, ["id", "text"], *([1, text] for text in DOCUMENTS)),
    "a.tsv": lambda f: write_csv(
        f, ["text", "label"], *([t, "x"] for t in DOCUMENTS), delimiter="\t"
    ),
    "b.csv": lambda f: write_csv(
        f, ["a, b", "text"], *(["1;2", t] for t in DOCUMENTS), delimiter=";"
    ),
    "a.feather": lambda f: feather.write_feather(TABLE, f, "zstd", chunksize=7),
    "a.arrow": lambda f: write_stream(f, TABLE),
}


@pytest.mark.parametrize("name", WRITERS)
def test_rows_are_the_same_in_every_format(tmp_path, monkeypatch, name):
    monkeypatch.setattr(rows, "_CHUNK", 100)
    monkeypatch.setattr(rows, "_BATCH", 3)
    WRITERS[name](tmp_path / name)
    assert texts(tmp_path / name) == DOCUMENTS


def test_json_array_is_read_object_by_object(tmp_path, monkeypatch):
    """Brackets, escapes, characters and numbers may be cut anywhere between two reads."""
    objects = [{"text": 'a]},{"\\ é猫🙂' * i, "n": 123.5e9} for i in range(9)]
    text = json.dumps(objects, ensure_ascii=False, indent=1)
    file = write(tmp_path / "a.json", "\ufeff" + text)
    for size in (3, 4, 5, 7, 50):
        monkeypatch.setattr(rows, "_CHUNK", size)
        assert read(file) == objects
    assert read(write(tmp_path / "b.json", "[]")) == []


def test_memory_holds_one_row_of_a_json_array(tmp_path):
    file = write(tmp_path / "a.json", json.dumps([{"text": "word " * 2000}] * 1000))
    tracemalloc.start()
    assert sum(1 for _ in file_rows(file, sniff(file), DataConfig())) == 1000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < file.stat().st_size / 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"text": "a"} {"text": "b"}]', "row 1: no comma or ] after it"),
        ("a.json", '[{"text": "a"}, 3]', "row 2: not a JSON object"),
        ("a.json", '[{"text": "a"}, {"text": "b"', r"row 2: invalid JSON \(Expecting"),
        ("a.json", '[{"text": "a"}', "row 1: no comma or ] after it; .* cut short"),
        ("a.json", '[{"text": "a"},', "row 2: not a JSON object"),
        ("a.json", '[{"text": "a"}] []', "goes on after the end"),
        ("a.json", '[{"text": ' + "[" * 99_999 + "]", "row 1: invalid JSON"),
        ("a.jsonl", '[\n{"text": "a"}\n]\n', "a JSON array, not a row a line; name it .json"),
        ("a.jsonl", '[{"text": "a"}]', "a JSON array, not a row a line; name it .json"),
        ("a.jsonl", '{"text": "a"},\n', "line 1: invalid JSON"),
        ("a.csv", 'id,text\n1,"a "b" c"\n', r"line 2: invalid CSV \(',' expected"),
        ("a.csv", 'id,text\n1,a\n2,"b\n3,c\n', "line 3: invalid CSV"),
        ("a.csv", "id,text\r1,a\r", "line 1: invalid CSV"),
        ("a.csv", "id,text\n1,a\n2,b,c\n", "line 3: 3 fields, but the header has 2; quote fields"),
    ],
)
def test_damaged_rows_are_named(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message) as caught:
        read(write(tmp_path / name, content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv"])
def test_long_row_is_refused_before_memory_holds_it(tmp_path, monkeypatch, name):
    monkeypatch.setattr(rows, "MAX_ROW", 2**18)
    long = "x" * 2**23
    content = {
        "a.json": json.dumps([{"text": "a"}, {"text": long}]),
        "a.csv": f"id,text\n1,a\n2,{long}",
    }.get(name, lines_of(["a", long]))
    packed = gzip.compress(content.encode()) if name.endswith("gz") else content
    file = write(tmp_path / name, packed)
    tracemalloc.start()
    with pytest.raises(InputError, match="(line|row) [23]: .*longer than 0.25 MiB"):
        read(file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**22


def test_quote_that_is_never_closed_is_found_before_memory_holds_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MAX_ROW", 2**12)
    before = csv.field_size_limit()
    file = write(tmp_path / "a.csv", 'id,text\n1,"a\n' + "2,b\n" * 9999)
    with pytest.raises(InputError, match="line 2: invalid CSV .field larger than field limit"):
        read(file)
    assert csv.field_size_limit() == before


def test_name_that_stands_twice_is_no_text(tmp_path):
    files = [
        write(tmp_path / "a.jsonl", '{"text": "a", "text": "b"}\n'),
        write(tmp_path / "a.csv", "text,text\na,b\n"),
    ]
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"])
    parquet.write_table(twice, tmp_path / "a.parquet")
    files += [write_stream(tmp_path / "a.arrow", twice), tmp_path / "a.parquet"]
    for file in files:
        assert read(file) == [{"text": ("a", "b")}]
    other = write(tmp_path / "b.jsonl", '{"text": "a", "meta": {"x": 1, "x": 2}}\n')
    assert texts(other) == ["a"]


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
)
@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_strings_of_tables_may_hold_invalid_utf8(tmp_path, kind, name):
    strings = pa.array([b"a\xffb", b"fine", None], pa.binary()).view(pa.string())
    strings = strings.dictionary_encode() if pa.types.is_dictionary(kind) else strings.cast(kind)
    table, file = pa.table({"text": strings}), tmp_path / name
    if name == "a.parquet":
        parquet.write_table(table, file)
    else:
        write_stream(file, table)
    assert texts(file) == ["a\ufffdb", "fine", None]


def flipped(content, at):
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def test_flipped_bit_in_a_parquet_file_with_checksums_is_found(tmp_path):
    file = tmp_path / "a.parquet"
    parquet.write_table(
        TABLE,
        file,
        write_page_checksum=True,
        compression="none",
        use_dictionary=False,
        write_statistics=False,  # flips there change no text
    )
    content = file.read_bytes()
    at = content.index(b"words and more words")
    for i in range(at, at + 2000, 500):
        with pytest.raises(InputError, match="a.parquet: damaged, .*; copy it again"):
            read(write(file, flipped(content, i)))


def test_arrow_stream_that_is_cut_short_is_refused(tmp_path):
    """Also between two batches, where pyarrow takes the end of the file for the end of the rows."""
    file = write_stream(tmp_path / "a.arrow", TABLE)
    content = file.read_bytes()
    assert texts(file) == DOCUMENTS
    batches = list(pa.ipc.open_stream(content))
    between = len(content) - 8 - len(batches[-1].serialize())
    for end in (len(content) - 8, between, len(content) // 2, 300):
        with pytest.raises(InputError, match="a.arrow: damaged, or cut short"):
            read(write(file, content[:end]))


def test_arrow_file_with_damaged_offsets_is_refused(tmp_path):
    """Not a crash of the process, which pyarrow's functions make of such offsets."""
    file = write_stream(tmp_path / "a.arrow", pa.table({"text": ["a" * 1001, "b"]}))
    content, offset = file.read_bytes(), (1001).to_bytes(4, "little")
    assert content.count(offset) == 1
    with pytest.raises(InputError, match="a.arrow: damaged, or not arrow"):
        read(write(file, content.replace(offset, b"\xff\xff\xff\x7f")))


def test_header_of_a_table_has_no_spaces_around_its_names(tmp_path):
    file = write(tmp_path / "a.csv", b"id, text\xc2\xa0\n1,a\n")
    assert texts(file) == ["a"]
