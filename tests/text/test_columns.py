import json

import pyarrow as pa
import pytest
from pyarrow import parquet
from texts import split_texts

from inl_jax.config import InputError
from inl_jax.text.columns import MissingColumn, row_text, text_columns


def write_rows(file, *rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_text_columns_are_those_with_text_in_most_rows():
    rows = [{"content": "A", "text": None}, {"content": None, "text": "B"}, {"text": "C"}]
    assert text_columns(rows, "", "here") == ("text",)
    assert text_columns(rows[:2], "", "here") == ("content",)  # the first of equals
    numbers = [{"data": 3, "Text": "t"}, {"data": 4, "Text": "u"}]
    assert text_columns(numbers, "", "here") == ("Text",)
    both = [{"prompt": "a", "completion": "b", "text": ""}]
    assert text_columns(both, "", "here") == ("prompt", "completion")
    assert text_columns([{"Text": "t", "text": "u"}], "text", "here") == ("text",)


def test_later_rows_say_which_column_is_the_text(make_corpus, tmp_path):
    rows = [{"content": "", "text": f"text {i}"} for i in range(9)]
    rows[0] = {"content": "a title", "text": "text 0"}
    table = pa.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "a.parquet")
    for file in (write_rows(tmp_path / "a.jsonl", *rows), tmp_path / "a.parquet"):
        (source,) = make_corpus(file, validation_fraction=0).sources
        assert split_texts(source, "train") == [f"text {i}" for i in range(9)]


@pytest.mark.parametrize("fraction", [0, 0.5])
def test_rows_without_text_or_with_half_of_it_are_counted_and_said(
    make_corpus, tmp_path, said, fraction
):
    file = write_rows(
        tmp_path / "a.jsonl",
        {"prompt": "Q1 ", "completion": "A1"},
        {"prompt": "Q2 ", "completion": None},
        {"prompt": "Q3 "},
        {"prompt": "", "completion": ""},
    )
    (source,) = make_corpus(file, validation_fraction=fraction).sources
    assert split_texts(source, "train") == ["Q1 A1"]
    assert (source.rows_without_text, source.rows_with_half) == (1, 2)
    assert any("skipped 3 rows: 1 without text, 2 with half of it" in line for line in said)


TURN = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"messages": [TURN]}, ""),
        ({"messages": [TURN]}, "messages"),
        ({"id": "x", "conversations": [{"from": "human", "value": "hi"}]}, ""),
        ({"prompt": [TURN], "completion": [TURN]}, ""),
        ({"chat": {"role": ["user"], "content": ["hi"]}, "title": "t"}, ""),
    ],
)
def test_conversation_is_answered_with_what_to_do(row, column, tmp_path, make_corpus):
    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    for file in (write_rows(tmp_path / "a.jsonl", row), tmp_path / "a.parquet"):
        with pytest.raises(InputError, match="holds a conversation, not text; join the turns"):
            make_corpus(file, column=column)


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Say hi.", "input": "", "output": "hi"},
        {"instruction": "Say hi.", "context": "", "response": "hi", "category": "open_qa"},
        {"Question": "q", "Answer": "a"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    ],
)
def test_parts_of_a_text_are_not_offered_one_by_one(row):
    with pytest.raises(InputError, match="is in parts .*: write all of it into a column text") as e:
        text_columns([row], "", "here")
    assert "data.column" not in str(e.value)


def test_columns_that_are_offered_hold_text():
    row = {"id": 3, "tags": ["a"], "body": "b", "a\nb" * 99: "c", "meta": {"x": 1}}
    with pytest.raises(MissingColumn) as caught:
        text_columns([row], "none", "here")
    offered = str(caught.value).partition("one of: ")[2].split(", ")
    assert offered[0] == "body" and len(offered) == 2 and "\n" not in offered[1]
    assert text_columns([row], "body", "here") == ("body",)
    with pytest.raises(InputError, match=r"write the text of each row into a column text \(there"):
        text_columns([{"id": 3}], "", "here")


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (3, "a number"),
        (float("nan"), "a number"),
        (True, "true or false"),
        (["a"], "a list"),
        ({"a": "b"}, "an object"),
        (("a", "b"), "two values"),
    ],
)
def test_values_that_are_no_text_are_refused_by_kind(value, kind):
    row = {"text": value, "body": "b"}
    with pytest.raises(InputError, match=f"column text holds {kind}, .*to one of: body"):
        row_text(row, ("text",), "here", bad_utf8="replace")
