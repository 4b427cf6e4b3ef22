"""Datasets and tokenizers of the hub, each at one commit, so that a run can be repeated."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from inl_jax.config import InputError
from inl_jax.console import first_line, say
from inl_jax.text.hub import need_datasets, parse
from inl_jax.tokens.tokenizer import is_hub_id

_COMMIT = re.compile("[0-9a-f]{40}")
_ANSWER_SECONDS = 20  # for the hub to answer


def pinned_paths(paths: Iterable[str], recorded: tuple[str, ...] = ()) -> tuple[str, ...]:
    """`data.paths`, whose datasets of the hub name their commits.

    Args:
      paths: as in `data.paths`.
      recorded: the paths of the run that is resumed, whose commits are kept.

    Raises:
      InputError: the hub cannot be asked, or the `datasets` package is missing.
    """
    return tuple(
        _pinned_and_said(path, "dataset", recorded)
        if path.startswith("hf:") and len(path) > 3 and not parse(path).is_local()
        else path
        for path in paths
    )


def pinned_tokenizer(name: str, recorded: str = "") -> str:
    """`data.tokenizer`, which names its commit if it is one of the hub.

    Raises:
      InputError: the hub cannot be asked.
    """
    return _pinned_and_said(name, "model", (recorded,)) if is_hub_id(name) else name


def _pinned_and_said(spec: str, kind: str, recorded: tuple[str, ...]) -> str:
    if kind == "dataset":
        need_datasets(spec)  # asked for before the network
    found = pin(spec, kind, recorded)
    if found in recorded and found != spec:
        say(f"data: {spec}: {found}, as the run has recorded; name another commit to change it")
    elif found != spec:
        say(f"data: {spec}: {found}")
    return found


def pin(spec: str, kind: Literal["dataset", "model"], recorded: tuple[str, ...] = ()) -> str:
    """`spec` at one commit: `hf:owner/name#COMMIT`, or `owner/name#COMMIT` for a model.

    Args:
      spec: a source or a tokenizer of the hub. One that names a commit is returned as it is.
      kind: which part of the hub holds it.
      recorded: specs with commits. The one of the same dataset and config, or tokenizer, is used.

    Raises:
      InputError: the hub does not have it; or it cannot be asked, and nothing was fetched before.
    """
    stem, _, revision = spec.partition("#")
    name = parse(stem).name if kind == "dataset" else stem
    if _COMMIT.fullmatch(revision):
        return spec
    for other in recorded:
        if other.partition("#")[0] == stem and _COMMIT.fullmatch(other.partition("#")[2]):
            return other
    return f"{stem}#{_commit(name, kind, revision)}"


def _commit(name: str, kind: str, revision: str) -> str:
    import huggingface_hub

    asked = {"repo_type": kind, "revision": revision or None}
    try:
        return huggingface_hub.HfApi().repo_info(name, timeout=_ANSWER_SECONDS, **asked).sha
    except Exception as error:  # of the hub, of its network library, and for a name it refuses
        try:  # what was fetched before; its folder is named after the commit
            found = huggingface_hub.snapshot_download(name, local_files_only=True, **asked)
        except Exception:
            at = f" with the revision {revision}" if revision else ""
            raise InputError(
                f"{name}: nothing here has this name, and the hub gives no {kind} of it{at} "
                f"({first_line(error)}); check the name and the network"
            ) from error
        return Path(found).name
