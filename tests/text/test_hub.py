import pytest
from hub import COMMITS, Hub
from texts import write_jsonl

from inl_jax.config import DataConfig
from inl_jax.text.hub import hub_rows, parse

A, B = COMMITS["main"], COMMITS["v2"]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    return Hub(monkeypatch, tmp_path)


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("hf:owner/name", ("owner/name", "", "")),
        ("hf:name@en", ("name", "en", "")),
        ("hf:owner/name#refs/pr/3", ("owner/name", "", "refs/pr/3")),
        ("hf:owner/name@en#v2", ("owner/name", "en", "v2")),
    ],
)
def test_parse_tells_name_config_and_revision(spec, parts):
    assert parse(spec) == parts and not parse(spec).is_local()


def test_parse_takes_a_directory_by_its_whole_name(tmp_path):
    folder = tmp_path / "me@lab" / "set#2"
    folder.mkdir(parents=True)
    assert parse(f"hf:{folder}") == (str(folder), "", "")
    assert parse(f"hf:{folder}@en") == (str(folder), "en", "")
    assert parse(f"hf:{tmp_path}/none").is_local()


def test_rows_of_the_hub_are_of_the_revision_that_is_named(hub):
    rows = [row for row, _, _ in hub_rows(f"hf:owner/name@en#{B}", DataConfig(hf_split="test"))]
    assert rows == [{"text": f"{B} row {i}"} for i in range(9)]
    assert hub.asked == [f"rows owner/name en test {B}"]


def test_rows_of_a_directory_have_no_revision(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ["a", "b"])
    assert [r["text"] for r, _, _ in hub_rows(f"hf:{tmp_path}", DataConfig())] == ["a", "b"]
