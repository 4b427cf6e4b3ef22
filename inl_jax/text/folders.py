"""Which files of a folder are training text, and which are other splits, binary or bookkeeping."""

import itertools
import os
import re
import stat
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from inl_jax.config import DataConfig, InputError
from inl_jax.console import plural, say
from inl_jax.text.columns import text_columns
from inl_jax.text.places import mode_of, special_kind
from inl_jax.text.rows import file_rows
from inl_jax.text.sniff import HEAD_BYTES, Kind, NotText, sniff, suffixes, unpacked
from inl_jax.text.splits import (
    PLAIN_SUFFIXES,
    ROW_SUFFIXES,
    is_data,
    other_splits,
    read_notes,
    split_of,
)

_ABOUT = re.compile(
    "(readme|licen[cs]e|copying|notice|citation|authors|changelog|contributing)([^a-z]|$)"
)
# The head of README.md in a repository of the Hugging Face hub.
_CARD = re.compile(
    rb"---\r?\n((?!---).*\n)*?(license|language|tags|pretty_name|configs|dataset_info|"
    rb"task_categories|size_categories|annotations_creators):"
)
# Unfinished downloads, copies of editors, checksums, and what `datasets` keeps of a `map`.
_LEFTOVER = re.compile(
    r".*(~|\.(part|partial|incomplete|crdownload|aria2|tmp|bak|orig|swp|lock|md5|sha\d+))"
    r"|#.*#|(md5|sha\d+)sums?(\.txt)?|cache-[0-9a-f]{16}(_\d+_of_\d+)?\.arrow"
)
_SHARD = re.compile(r"(.*?)\d+-of-0*(\d+)(.*)")
_LOOK_ROWS = 10  # of a table, for a text column


def walk(root: Path, excluded: Collection[str] = ()) -> Iterator[Path]:
    """The files under `root` in a fixed order, without hidden ones.

    A link to a folder is not followed, but given like a file.

    Raises:
      InputError: a folder cannot be read.
    """
    for folder, folders, names in os.walk(root, onerror=_refuse):
        folders[:] = sorted(f for f in folders if f not in excluded and not f.startswith("."))
        if {"blobs", "refs", "snapshots"} <= {*folders}:  # the cache of the hub
            folders[:] = ["snapshots"]  # its files are links to the blobs
        links = (name for name in folders if Path(folder, name).is_symlink())
        for name in sorted([*names, *links]):
            if not name.startswith("."):
                yield Path(folder, name)


def _refuse(error: OSError) -> None:
    raise InputError(f"{error.filename}: {error.strerror}; name a folder that you may read")


def text_files(folder: Path, data: DataConfig) -> dict[Path, Kind]:
    """The files of a folder that are training text, and how to read each. Says which are not.

    Not read are files without text, other splits than `data.hf_split`, and what only describes the
    data beside it. JSON and CSV need a text column to be read; files whose suffix says rows must
    have one.

    Raises:
      InputError: no text is left, or a file of rows cannot be read.
    """
    found: dict[Path, Kind] = {}
    skipped: Counter[str] = Counter()
    reasons: list[str] = []
    files, others = read_notes(folder, list(walk(folder)), data)
    others |= other_splits(folder, files, data)
    card = _card(folder)
    if b"- split: " in card and not any(split_of(f.relative_to(folder)) for f in files):
        raise InputError(f"data.paths: {folder}: its card names the splits; write hf:{folder}")
    unpacked_files = {*files}
    for file in files:
        if _LEFTOVER.fullmatch(file.name.lower()):
            skipped[f"{file.suffix or file.name} (a copy, a checksum or unfinished)"] += 1
            continue
        if suffixes(file)[1] and file.with_suffix("") in unpacked_files:
            skipped[f"{file.suffix} (packed, beside the same unpacked)"] += 1
            continue
        try:
            if file in others:
                continue
            if kind := _kind_of_text(file, data):
                found[file] = kind
            elif is_data(file):
                skipped[f"{file.suffix} (empty)"] += 1
        except NotText as error:
            if suffixes(file)[0] in ROW_SUFFIXES:
                raise
            skipped[f"{file.suffix or 'without suffix'} ({error.found})"] += 1
            reasons.append(str(error))
    about = _descriptions(folder, found, bool(card))
    found = {file: kind for file, kind in found.items() if file not in about}

    only_about = all(_ABOUT.match(file.name.lower()) for file in found)
    if not found or (only_about and (others or reasons)):
        raise InputError(f"data.paths: {folder} holds {_why_nothing(others, reasons, data)}")
    if others:
        splits = ", ".join(sorted({*others.values()}))
        say(f"data: {folder}: left out other splits ({splits}): {_names(folder, others)}")
    if about:
        say(f"data: {folder}: left out what describes the data: {_names(folder, about)}")
    if skipped:
        kinds = ", ".join(f"{count} {kind}" for kind, count in skipped.most_common(5))
        say(f"data: {folder}: skipped {plural(skipped.total(), 'file')}: {kinds}")
    shards = Counter((file.parent, *m.groups()) for file in found if (m := _SHARD.match(file.name)))
    for (parent, start, total, end), count in shards.items():
        if count < int(total):
            say(
                f"WARNING: {parent}: holds {count:,} of {int(total):,} files "
                f"{start}*{end}; copy the others there if they are meant, too"
            )
    return found


def _why_nothing(others: dict[Path, str], reasons: list[str], data: DataConfig) -> str:
    if others:
        splits = ", ".join(sorted({*others.values()}))
        return f"no text of split {data.hf_split}; set data.hf_split to one of: {splits}"
    if reasons:
        return f"no text to train on; {reasons[0]}"
    return "no text; name a file or folder that does"


def _names(folder: Path, files: Collection[Path]) -> str:
    names = sorted(str(file.relative_to(folder)) for file in files)
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _kind_of_text(file: Path, data: DataConfig) -> Kind | None:
    """How to read a file in a folder; None if it is empty."""
    mode = mode_of(file)
    if mode is None:
        raise NotText(f"{file}: a broken link; mend it", "a broken link")
    if stat.S_ISDIR(mode):
        raise NotText(f"{file}: a link to a folder; name that, too", "a link to a folder")
    if special := special_kind(mode):
        raise NotText(f"{file}: {special}; write it to a file first", special)
    kind = sniff(file)
    if file.stat().st_size == 0:
        return None
    if kind.format not in ("json", "jsonl", "csv") or suffixes(file)[0] in ROW_SUFFIXES:
        return kind
    try:
        rows = [row for row, *_ in itertools.islice(file_rows(file, kind, data), _LOOK_ROWS)]
    except InputError as error:
        if kind.packing:  # it may be damaged
            raise
        raise NotText(str(error), "no rows") from None
    try:
        return kind if rows and text_columns(rows, data.column, str(file)) else None
    except InputError as error:
        raise NotText(str(error), "no text column") from None


def _descriptions(folder: Path, found: dict[Path, Kind], has_card: bool) -> set[Path]:
    """The files that only describe the data beside them, such as its README."""
    texts = [file for file, kind in found.items() if kind == Kind("text", "")]
    if has_card:
        return {file for file in texts if file.suffix.lower() not in PLAIN_SUFFIXES}
    others = {file for file in texts if not split_of(file.relative_to(folder))}
    about = {file for file in others if _ABOUT.match(file.name.lower())}
    return about if about == others and len(about) < len(found) else set()


def _card(folder: Path) -> bytes:
    """The dataset card of a folder, as far as it is looked at; empty if there is none."""
    card = folder / "README.md"
    if not card.is_file():
        return b""
    with unpacked(card, "") as stream:
        head = stream.read(HEAD_BYTES)
    return head if _CARD.match(head) else b""
