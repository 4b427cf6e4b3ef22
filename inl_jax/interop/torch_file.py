"""PyTorch's .pt files: written, and read without running code from them."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from inl_jax.config import InputError
from inl_jax.console import first_line, say
from inl_jax.interop.published import EMBEDDING, HEAD

# What DistributedDataParallel, torch.compile, FSDP and activation checkpointing put into names.
_WRAPPER = r"(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
_EMBEDDING = re.compile(rf"((?:.*\.)?)token_embedding\.(?:{_WRAPPER})*weight")


class _Found(NamedTuple):
    """Where in a file the weights of a model are."""

    place: str
    """The dictionary that holds them, as in `["model"]`; empty if it is the whole file."""
    prefix: str
    """What stands before the name of each weight."""
    entries: dict[Any, Any]
    """That dictionary."""


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Published weights by name, as arrays; narrower floats become float32.

    The file may hold them beside a training state, and under names that torch.compile,
    DistributedDataParallel or another module has prefixed. A line then says what was read.

    Raises:
      InputError: PyTorch is not installed, or the file does not hold one state_dict.
    """
    torch = need_torch()
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; name a .pt file that holds a state_dict")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types, and advises to read unsafely
        raise InputError(
            f"{path}: not a .pt file that can be read without running code from it "
            f"({type(error).__name__}); copy it again if it is damaged, or save the model's "
            "state_dict() alone"
        ) from error
    found = _find_one(path, loaded)
    weights, left_out = {}, []
    for name, value in found.entries.items():
        is_weight = isinstance(name, str) and isinstance(value, torch.Tensor)
        if is_weight and name.startswith(found.prefix):
            plain = re.sub(rf"(?<![^.]){_WRAPPER}", "", name.removeprefix(found.prefix))
            weights[plain] = _to_numpy(value, f"{path}: {name!r}")
        else:
            left_out.append(repr(name))
    if found.place or found.prefix or left_out:
        place = f" in {found.place}" if found.place else ""
        prefix = f", each named without {found.prefix!r}" if found.prefix else ""
        others = f"; not read: {', '.join(left_out[:5])}" if left_out else ""
        more = f" and {len(left_out) - 5} more" if len(left_out) > 5 else ""
        say(f"{path}: {len(weights)} weights{place}{prefix}{others}{more}")
    return weights


def write_state_dict(path: Path, weights: Mapping[str, np.ndarray]) -> None:
    """Writes published weights as a .pt file, the tied head as the same tensor.

    Raises:
      InputError: PyTorch is not installed.
      OSError: the file cannot be written.
    """
    torch = need_torch()
    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    with open(path, "wb") as file:  # given the path, torch would not say that the disk is full
        torch.save(tensors | {HEAD: tensors[EMBEDDING]}, file)


def need_torch() -> ModuleType:
    """PyTorch.

    Raises:
      InputError: it is not installed.
    """
    try:
        import torch
    except ImportError:
        raise InputError(".pt files need PyTorch: pip install 'inl_jax[torch]'") from None
    return torch


def _find_one(path: str | Path, loaded: Any) -> _Found:
    found = list(_find(loaded))
    if len(found) > 1:
        places = ", ".join(f"{place}[{prefix + EMBEDDING!r}]" for place, prefix, _ in found)
        raise InputError(f"{path}: holds several models ({places}); save one state_dict() alone")
    if not found:
        keys = ", ".join(map(repr, loaded)) if isinstance(loaded, dict) else type(loaded).__name__
        raise InputError(
            f"{path}: not a state_dict of an INL-LLM: no tensor is named {EMBEDDING} (it holds "
            f"{keys[:200]}); save the model's state_dict()"
        )
    return found[0]


def _find(entries: Any, place: str = "", depth: int = 3) -> Iterator[_Found]:
    """The embeddings in a dictionary and in the dictionaries in it."""
    for name, value in entries.items() if isinstance(entries, dict) and depth else ():
        if isinstance(value, dict):
            yield from _find(value, f"{place}[{name!r}]", depth - 1)
        elif (match := _EMBEDDING.fullmatch(str(name))) and hasattr(value, "numpy"):
            yield _Found(place, match[1], entries)


def _to_numpy(tensor: Any, where: str) -> np.ndarray:
    try:
        narrow = tensor.is_floating_point() and tensor.itemsize < 4
        return (tensor.float() if narrow else tensor).detach().numpy()
    except Exception as error:  # sparse, quantized or without data, each of another type
        raise InputError(
            f"{where} is no plain tensor ({first_line(error)}); save it dense and not quantized"
        ) from error
