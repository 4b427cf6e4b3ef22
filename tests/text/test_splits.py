import json
from pathlib import Path

import pytest

from inl_jax.config import DataConfig, InputError
from inl_jax.text.splits import other_splits, read_notes, split_of


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("data/train-00000-of-00001.parquet", "train"),
        ("c4-validation.00000-of-00008.json.gz", "validation"),
        ("wiki.valid.tokens", "validation"),
        ("test/pos/1.txt", "test"),
        ("train/dev.jsonl", "validation"),
        ("Eval_2.JSONL", "test"),
        ("training_set.csv", "train"),
        ("contest.jsonl", ""),
        ("trains.txt", ""),
        ("web.jsonl", ""),
    ],
)
def test_split_is_a_word_of_the_path(path, split):
    assert split_of(Path(path)) == split


@pytest.mark.parametrize(
    ("names", "hf_split", "others"),
    [
        ("train.jsonl test.jsonl valid.csv extra.json", "train", "test.jsonl valid.csv"),
        ("train.jsonl test.jsonl valid.csv", "validation", "train.jsonl test.jsonl"),
        ("train.jsonl test.jsonl valid.csv", "train+test", "valid.csv"),
        ("train.jsonl test.jsonl", "all", ""),
        ("web.jsonl test.jsonl.zst", "train", "test.jsonl.zst"),
        ("train/1.txt test/1.txt", "train", "test/1.txt"),
        ("The_Test_of_Time.txt Emma.txt", "train", ""),
        ("train.py test.py test.md val.c", "train", ""),
        ("train_sft.parquet train_gen.parquet test_sft.parquet", "train_sft", "train_gen test_sft"),
    ],
)
def test_other_splits_are_files_of_data_by_their_names(names, hf_split, others):
    files = [Path("/test", name) for name in names.split()]
    found = other_splits(Path("/test"), files, DataConfig(hf_split=hf_split))
    assert [str(file.relative_to("/test")).removesuffix(".parquet") for file in found] == (
        others.split()
    )


def test_part_of_a_split_is_refused_with_what_reads_it():
    with pytest.raises(InputError, match=r"set data.hf_split=train, and data.max_documents"):
        other_splits(Path("/a"), [Path("/a/train.csv")], DataConfig(hf_split="train[:9]"))
    assert not other_splits(Path("/a"), [Path("/a/b.csv")], DataConfig(hf_split="train[:9]"))


@pytest.fixture
def saved(tmp_path):
    """Two splits as `datasets.save_to_disk` writes them; train had more shards before."""
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "other"]}')
    for split in ("train", "other"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "dataset_info.json").write_text("{}")
        (tmp_path / split / "data-00000-of-00001.arrow").touch()
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
        (tmp_path / split / "state.json").write_text(json.dumps(state))
    (tmp_path / "train" / "data-00001-of-00002.arrow").touch()
    return tmp_path


def all_files(folder):
    return sorted(file for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("split", ["train", "other"])
def test_notes_of_save_to_disk_name_the_shards(saved, split):
    files, others = read_notes(saved, all_files(saved), DataConfig(hf_split=split))
    assert files == [saved / split / "data-00000-of-00001.arrow"]
    assert {*others.values()} == {"train", "other"} - {split}


def test_missing_split_and_missing_shard_are_named(saved):
    with pytest.raises(
        InputError, match="no split rest; set data.hf_split to one of: train, other"
    ):
        read_notes(saved, all_files(saved), DataConfig(hf_split="rest"))
    (saved / "train" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(InputError, match="data-00000-of-00001.arrow: missing, but .*state.json"):
        read_notes(saved, all_files(saved), DataConfig())


@pytest.mark.parametrize("note", ["{", "[]", '{"_data_files": 1}', '{"_data_files": [1, {}]}'])
def test_other_files_of_that_name_are_no_notes(tmp_path, note):
    (tmp_path / "state.json").write_text(note)
    (tmp_path / "dataset_dict.json").write_text('{"splits": {}}')
    files, others = read_notes(tmp_path, all_files(tmp_path), DataConfig())
    assert tmp_path / "state.json" in files and not others
