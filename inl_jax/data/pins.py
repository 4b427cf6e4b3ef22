"""Datasets and tokenizers of the hub, each at one commit, so that a run can be repeated."""

from collections.abc import Iterable

from inl_jax.console import say
from inl_jax.text.hub import need_datasets, parse, pin
from inl_jax.tokens.tokenizer import is_hub_id


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
