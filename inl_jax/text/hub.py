"""Datasets of the Hugging Face hub or of the disk: their names, revisions and rows."""

from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from inl_jax.config import DataConfig, InputError
from inl_jax.console import first_line
from inl_jax.text.columns import usable_columns
from inl_jax.text.places import hub_name, mode_of
from inl_jax.text.rows import Rows, decoded_row


class HubName(NamedTuple):
    """What `hf:NAME`, `hf:NAME@CONFIG`, `hf:NAME#REVISION` or `hf:NAME@CONFIG#REVISION` names."""

    name: str
    """owner/name on the hub, or a directory."""
    config: str
    revision: str
    """A commit, branch or tag; empty for the newest, and for a directory."""

    def is_local(self) -> bool:
        """Whether it is a directory, which may not exist."""
        return self.name.startswith(("/", ".")) or mode_of(Path(self.name)) is not None


def parse(spec: str) -> HubName:
    """The parts of an `hf:` source.

    Raises:
      InputError: the name cannot be looked for on the disk.
    """
    found = HubName(*hub_name(spec), "")
    if found.is_local():
        return found
    stem, _, revision = spec.partition("#")
    return HubName(*hub_name(stem), revision)


def hub_rows(spec: str, data: DataConfig) -> Rows:
    """The rows of a source as `parse` reads it, at `data.hf_split`.

    Raises:
      InputError: the dataset or its split cannot be read, or the `datasets` package is missing.
    """
    datasets = need_datasets(spec)
    source = parse(spec)
    name, config, revision = source
    if source.is_local() and not Path(name).is_dir():
        raise InputError(f"data.paths: no such directory: {name} (of {spec}); name one that exists")
    try:
        if any(Path(name, mark).exists() for mark in ("dataset_dict.json", "state.json")):
            rows = datasets.load_from_disk(name)
            rows = rows[data.hf_split] if isinstance(rows, dict) else rows
        else:
            rows = datasets.load_dataset(
                name,
                config or None,
                split=data.hf_split,
                streaming=True,
                revision=revision or None,
            )
        columns = usable_columns(rows.column_names or (), data.column)
        if columns:  # known before the first row: fetch only the text
            rows = rows.select_columns(columns)
        for number, row in enumerate(rows, 1):
            yield decoded_row(list(row.items()), f"{spec} row {number}", data.bad_utf8)
    except InputError:
        raise
    except Exception as error:  # each backend of datasets raises exceptions of its own
        raise InputError(
            f"{spec}, split {data.hf_split}: {type(error).__name__}: {first_line(error)}; check "
            "the name, data.hf_split and the network"
        ) from error


def need_datasets(spec: str) -> ModuleType:
    """The package `datasets`.

    Raises:
      InputError: it is missing.
    """
    try:
        import datasets
    except ImportError:
        raise InputError(f"{spec}: needs datasets; pip install 'inl_jax[data]'") from None
    return datasets
