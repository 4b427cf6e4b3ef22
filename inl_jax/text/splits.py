"""Splits of a dataset in a folder: told by names, and by what `save_to_disk` noted."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from inl_jax.config import DataConfig, InputError
from inl_jax.files import read_json
from inl_jax.text.sniff import suffixes

PLAIN_SUFFIXES = (".txt", ".text", ".tokens", ".raw")
"""Suffixes of text that is no code and no document."""
ROW_SUFFIXES = (".jsonl", ".ndjson", ".parquet", ".arrow", ".feather")
"""Suffixes of files that cannot be anything but rows."""

# Words in the names of files and folders, as `datasets` reads them.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def split_of(path: Path, own_names: Iterable[str] = ()) -> str:
    """The split that a path names: one of `own_names`, else the last usual one, else empty."""
    text = str(path).lower()
    for name in own_names:
        if re.search(rf"(?<![a-z]){re.escape(name.lower())}(?![a-z])", text):
            return name
    return next((_SPLITS[w] for w in reversed(re.split("[^a-z]+", text)) if w in _SPLITS), "")


def other_splits(folder: Path, files: Iterable[Path], data: DataConfig) -> dict[Path, str]:
    """The files under `folder` named after splits other than `data.hf_split`, and these splits.

    A text may be about a test: its name counts only if another file is named after a wanted split.
    That of code or of a document never counts.

    Raises:
      InputError: a part of a split is wanted.
    """
    own_names = {*data.hf_split.split("+")} - _SPLITS.keys()
    splits = {
        file: split
        for file in files
        if is_data(file) or file.suffix.lower() in PLAIN_SUFFIXES
        if (split := split_of(file.relative_to(folder), own_names))
    }
    if not splits or data.hf_split == "all":
        return {}
    wanted = _wanted(folder, data)
    certain = not wanted.isdisjoint(splits.values())
    return {
        file: split
        for file, split in splits.items()
        if split not in wanted and (certain or is_data(file))
    }


def is_data(file: Path) -> bool:
    """Whether a name says that a file is packed, or holds rows."""
    suffix, packing = suffixes(file)
    return packing != "" or suffix in (*ROW_SUFFIXES, ".json", ".csv", ".tsv")


def read_notes(
    folder: Path, files: list[Path], data: DataConfig
) -> tuple[list[Path], dict[Path, str]]:
    """Sorts files as the notes of `datasets.save_to_disk` among them say.

    Returns:
      the files to read, without notes and shards of an older save; files of other splits, and
      which.

    Raises:
      InputError: the split is not there, or a shard is missing.
    """
    others: dict[Path, str] = {}
    notes = [file for file in files if file.name == "dataset_dict.json"]
    for note in notes:
        splits = _items(read_json(note).get("splits"), str)
        if data.hf_split == "all" or not splits:
            continue
        wanted = _wanted(folder, data)
        unread = {
            note.parent / name: name for name in splits if _SPLITS.get(name, name) not in wanted
        }
        if len(unread) == len(splits):
            raise InputError(
                f"data.paths: {note.parent} has no split {data.hf_split}; set data.hf_split to "
                f"one of: {', '.join(splits)}"
            )
        others |= {file: unread[file.parent] for file in files if file.parent in unread}
    files = [file for file in files if file not in others and file not in notes]
    for note in [file for file in files if file.name == "state.json"]:
        parts = _items(read_json(note).get("_data_files"), dict)
        shards = [note.parent / name for name in _items([p.get("filename") for p in parts], str)]
        if missing := {*shards}.difference(files):
            raise InputError(f"{min(missing)}: missing, but {note} names it; copy it again")
        if shards:
            files = [file for file in files if file.parent != note.parent] + shards
    return files, others


def _items(value: Any, kind: type) -> list[Any]:
    return [item for item in value if isinstance(item, kind)] if isinstance(value, list) else []


def _wanted(folder: Path, data: DataConfig) -> set[str]:
    """The names of the splits to read."""
    if "[" in data.hf_split:
        raise InputError(
            f"data.hf_split={data.hf_split}: {folder} is read by whole splits; set data.hf_split="
            f"{data.hf_split.partition('[')[0]}, and data.max_documents for the first rows alone"
        )
    return {_SPLITS.get(name, name) for name in data.hf_split.split("+")}
