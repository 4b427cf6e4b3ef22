"""Weights to start from: those of a run, of an exported model, or of a published .pt file."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from inl_jax.config import InputError, ModelConfig, TrainConfig
from inl_jax.config_file import differences
from inl_jax.console import say
from inl_jax.interop.exported_weights import is_exported, open_exported, refuse_pointer
from inl_jax.interop.published import POSITIONS, config_from_torch, params_from_torch
from inl_jax.interop.torch_file import read_state_dict
from inl_jax.parallel.sharding import put
from inl_jax.storage.identity import FREE_FIELDS, steps_on_disk
from inl_jax.storage.run_dir import (
    check_run,
    check_tokenizer_of,
    has_begun,
    read_config,
    read_tokenizer,
    unequal,
)
from inl_jax.storage.weights import read_params
from inl_jax.tokens.tokenizer import Tokenizer
from inl_jax.tokens.tokenizer import load as load_tokenizer

# Fields in which a run may differ from the weights it starts from, and that change what they
# compute: a line says so.
_TOLD = ("model.num_iterations", "model.max_seq_len", "model.dropout")
_FREE = (*FREE_FIELDS, "model.param_dtype", "model.compute_dtype", "model.initial_beta")
_OF_ATTENTION = ("model.num_heads", "model.num_kv_heads")
_OF_INTEGRATOR = (
    *("model.controller_width", "model.dt"),
    *("model.excitation_amplitude", "model.kappa"),
)


class Weights(NamedTuple):
    """Weights to start from. A .pt file is in memory, others are not read yet."""

    model: ModelConfig
    read: Callable[[str, Any], tuple[str, Any]]
    """(param_dtype, shardings) to what they are, for people, and the parameters."""


def kind_of(path: Path) -> Literal["run", "exported", "published"]:
    """What a path names.

    Raises:
      InputError: nothing that holds weights, or that may be read.
    """
    try:
        if is_exported(path):
            return "exported"
        if path.is_file():
            if path.suffix == ".safetensors":
                raise InputError(f"{path}: name {path.parent}, which holds its config.json too")
            refuse_pointer(path)
            return "published"
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name weights that can be read") from None
    if has_begun(path):
        return "run"
    raise InputError(
        f"{path}: not a run directory (no config.json in it), nor an exported model or a .pt file; "
        "name one that exists"
    )


def find_weights(path: str | Path, model: ModelConfig) -> Weights:
    """The weights at a path.

    Args:
      path: a run, an exported directory or a published file.
      model: the architecture wanted, for what a published file does not tell.

    Raises:
      InputError: there are none, or they are damaged.
    """
    path = Path(path)
    kind = kind_of(path)
    if kind == "exported":
        exported = open_exported(path)
        return Weights(exported.model, lambda *to: (str(exported), exported.read(*to)))
    if kind == "published":
        return _published(path, model)
    if not steps_on_disk(path):
        raise InputError(f"init_from={path}: has no checkpoint; name a run that saved one")
    saved = read_config(path).model

    def read(param_dtype: str, shardings: Any) -> tuple[str, Any]:
        source = dataclasses.replace(model, param_dtype=saved.param_dtype)
        step, params = read_params(path, source, shardings=shardings)
        return f"a run at update {step}", jax.tree.map(lambda p: p.astype(param_dtype), params)

    return Weights(saved, read)


def _published(path: Path, model: ModelConfig) -> Weights:
    state_dict = read_state_dict(path)
    untold = {"dropout": model.dropout}
    if POSITIONS not in state_dict:
        untold["max_seq_len"] = model.max_seq_len
    found = config_from_torch(state_dict, num_iterations=max(1, model.num_iterations), **untold)

    def read(param_dtype: str, shardings: Any) -> tuple[str, Any]:
        typed = dataclasses.replace(found, param_dtype=param_dtype)
        params = params_from_torch(state_dict, typed, asarray=np.asarray)
        what = f"a published model ({len(state_dict)} arrays)"
        return what, jax.tree.map(put, params, shardings)

    return Weights(found, read)


def kept_tokenizer(config: TrainConfig) -> Tokenizer | None:
    """The BPE of this run, or of the weights it starts from, if `config` asks for it by size.

    Trained again on text that has changed, it would be another.

    Raises:
      InputError: it is damaged, or `init_from` names no weights.
    """
    if not config.data.tokenizer.startswith("bpe:"):
        return None
    if has_begun(config.run_dir):
        same = read_config(config.run_dir).data.tokenizer == config.data.tokenizer
        return read_tokenizer(config.run_dir) if same else None
    given = _tokenizer_of(Path(config.init_from)) if config.init_from else None
    return given if given and given.name == config.data.tokenizer else None


def _tokenizer_of(path: Path) -> Tokenizer | None:
    """The tokenizer that weights belong to; None if they do not tell."""
    kind = kind_of(path)
    if kind == "exported":
        return load_tokenizer(path)
    return read_tokenizer(path) if kind == "run" else None


def check_start(
    config: TrainConfig, tokenizer: Tokenizer | None = None, *, tell: Callable[[str], None] = say
) -> None:
    """Checks that this config may start in its run directory, or resume the run there.

    Calls `tell` with a line for each change. A tokenizer that is not given is not checked.

    Raises:
      InputError: as `check_run`; or the weights that `init_from` names are damaged, or of another
        model or tokenizer, and the field and both values are named.
    """
    check_run(config, tokenizer, tell=tell)
    if not config.init_from or steps_on_disk(config.run_dir):
        return
    path = Path(config.init_from)
    weights = find_weights(path, config.model)
    own = _tokenizer_of(path)
    if tokenizer and own:  # first, since a model of other sizes may be another tokenizer's
        check_tokenizer_of(f"the model in {path}", own, tokenizer, file=path / "tokenizer.json")
    elif tokenizer:
        tell(
            f"{path} tells neither its tokenizer nor its iterations: {tokenizer.name} and "
            f"model.num_iterations={config.model.num_iterations} must be those of its training"
        )
    attention = weights.model.uses_attention or config.model.uses_attention
    without = () if attention else _OF_ATTENTION
    without += () if weights.model.num_iterations or config.model.num_iterations else _OF_INTEGRATOR
    changed = [
        (field, theirs, ours)
        for field, theirs, ours in differences(weights.model, config.model, "model.")
        if field not in _FREE and field not in without
    ]
    refused = [
        (field, theirs, ours)
        for field, theirs, ours in changed
        if field not in _TOLD or (field == "model.num_iterations" and 0 in (theirs, ours))
    ]
    if refused:
        raise unequal(refused, f"the weights in {path} have", "name other weights")
    for field, theirs, ours in changed:
        tell(f"changed since the weights in {path}: {field} {theirs} -> {ours}")
