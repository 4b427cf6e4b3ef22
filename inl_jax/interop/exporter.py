"""A run as a directory that transformers loads, or as a published .pt file.

transformers needs nothing of ours for it: the code of the model lies in the directory.
"""

import contextlib
import importlib.resources
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from inl_jax.checks import InputError, require
from inl_jax.config import TrainConfig
from inl_jax.console import plural, reason, say, size
from inl_jax.files import json_text, sync, user_path, write_text
from inl_jax.interop.exported_config import MODEL_TYPE, to_json_fields
from inl_jax.interop.exported_tokenizer import save_tokenizer
from inl_jax.interop.model_card import model_card
from inl_jax.interop.named_weights import named_views
from inl_jax.interop.published import params_to_torch
from inl_jax.interop.torch_file import need_torch, write_state_dict
from inl_jax.storage.disk import write_failure
from inl_jax.storage.run_dir import read_config, read_tokenizer
from inl_jax.storage.weights import read_params
from inl_jax.tokens.tokenizer import Tokenizer

PUBLISHED = ".pt"  # what the name of a file in the published format ends in
DTYPES = ("float32", "bfloat16")
CONFIG_NAME = "config.json"
_SHARD = 5_000_000_000  # bytes; what the hub recommends at most


class Saved(NamedTuple):
    """A saved step of a run."""

    run_dir: Path
    config: TrainConfig
    tokenizer: Tokenizer
    step: int
    params: Any


def export(
    run_dir: str | Path,
    out: str | Path,
    *,
    step: int | str = "latest",
    dtype: str | None = None,
    max_shard_bytes: int = _SHARD,
) -> int:
    """Writes a model for transformers; returns the step that was read.

    Args:
      run_dir: the run.
      out: the directory to make, new or empty; or a name that ends in .pt, for a file in the
        published format.
      step: a saved update, "latest", or "best" (by validation loss).
      dtype: float32 or bfloat16; None is that of the run.
      max_shard_bytes: weights beyond this are split into several files.

    Raises:
      InputError: there is no such checkpoint or it is damaged, `out` is taken, a package is
        missing, or the published format cannot hold the model.
      DiskFull: there is no space. Nothing is left at `out`.
      MachineFailure: `out` cannot be written for another reason.
    """
    out = check_out(out, dtype)
    saved = read_saved(run_dir, step=step)
    write_saved(saved, out, dtype=dtype, max_shard_bytes=max_shard_bytes)
    return saved.step


def check_out(out: str | Path, dtype: str | None) -> Path:
    """The path to write, once nothing is there and the packages for it are.

    Raises:
      InputError: as `export`.
    """
    out = user_path(out, "out")
    require(dtype in (None, *DTYPES), f"dtype={dtype}: choose one of {', '.join(DTYPES)}")
    if out.suffix == PUBLISHED:
        require(not os.path.lexists(out), f"out={out}: exists; name a new file")
        require(dtype is None, f"dtype={dtype}: the published format is float32; leave dtype out")
        need_torch()
        return out
    if os.path.lexists(out):
        require(out.is_dir() and not out.is_symlink(), f"out={out}: exists; name a new directory")
        require(not any(out.iterdir()), f"out={out}: is not empty; name a new directory")
        # Neither can be replaced by the finished directory.
        fixed = out.is_mount() or out.samefile(".")
        require(not fixed, f"out={out}: name a new directory in it, such as {out / 'model'}")
    try:
        import safetensors  # noqa: F401
    except ImportError:
        raise InputError("an export needs safetensors: pip install 'inl_jax[hf]'") from None
    return out


def read_saved(run_dir: str | Path, *, step: int | str = "latest") -> Saved:
    """A saved step of a run, verified by its checksums.

    Raises:
      InputError: there is no such run or checkpoint, or it is damaged.
    """
    run_dir = user_path(run_dir, "run_dir")
    config = read_config(run_dir)
    found, params = read_params(run_dir, config.model, step=step)
    return Saved(run_dir, config, read_tokenizer(run_dir), found, params)


def write_saved(
    saved: Saved, out: Path, *, dtype: str | None = None, max_shard_bytes: int = _SHARD
) -> None:
    """Writes a saved step, whole, at a path that `check_out` has passed; see `export`."""
    model = saved.config.model
    if out.suffix == PUBLISHED:
        weights = params_to_torch(saved.params, model)
        with _whole(out, sum(array.nbytes for array in weights.values())) as file:
            write_state_dict(file, weights)
        say(
            f"{out}: update {saved.step}; its format does not hold dropout={model.dropout:g}, nor "
            f"what inl import needs: --num_iterations {model.num_iterations} --tokenizer "
            f"{saved.run_dir}"
        )
        return
    weights = named_views(saved.params, model)
    dtype = dtype or model.param_dtype
    item = np.dtype(dtype).itemsize
    num_bytes = sum(view.size for view in weights.values()) * item
    with _whole(out, num_bytes) as folder:
        folder.mkdir()
        write_text(folder / CONFIG_NAME, json_text(_config(saved, dtype), indent=2))
        generation = json_text(_generation(saved), indent=2)
        write_text(folder / "generation_config.json", generation)
        end = save_tokenizer(saved.tokenizer, folder, max_length=model.max_seq_len)
        for code in (importlib.resources.files("inl_jax.interop") / "exported").iterdir():
            if code.name.endswith("_inl.py"):
                write_text(folder / code.name, code.read_text(encoding="utf-8"))
        card = model_card(saved.run_dir, saved.config, step=saved.step, dtype=dtype, end=end)
        write_text(folder / "README.md", card)
        files = _save_weights(weights, folder, dtype, max_shard_bytes)
    if item < np.dtype(model.param_dtype).itemsize:
        say(f"weights of {model.param_dtype} were rounded to the nearest {dtype}")
    say(f"{out}: update {saved.step}, {size(num_bytes)} of {dtype} in {plural(files, 'file')}")


def _save_weights(
    weights: dict[str, np.ndarray], folder: Path, dtype: str, max_shard_bytes: int
) -> int:
    """Writes safetensors, and an index if there are several; returns the number of files.

    One file at a time is in memory beside `weights`.
    """
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    shards = split_state_dict_into_shards_factory(
        weights,
        get_storage_size=lambda view: view.size * np.dtype(dtype).itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for file, names in shards.filename_to_tensors.items():
        arrays = {name: np.ascontiguousarray(weights[name], dtype) for name in names}
        try:
            save_file(arrays, folder / file, metadata={"format": "pt"})  # transformers asks for it
        except SafetensorError as error:
            raise OSError(str(error)) from error
        shutil.copymode(folder / CONFIG_NAME, folder / file)  # else nobody else may read it
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_text(folder / "model.safetensors.index.json", json_text(index, indent=2))
    return len(shards.filename_to_tensors)


def _config(saved: Saved, dtype: str) -> dict[str, Any]:
    return {
        **to_json_fields(saved.config.model),
        "model_type": MODEL_TYPE,
        "architectures": ["InlForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_inl.InlConfig",
            "AutoModel": "modeling_inl.InlModel",
            "AutoModelForCausalLM": "modeling_inl.InlForCausalLM",
        },
        "dtype": dtype,
        "tie_word_embeddings": True,
        **_special_ids(saved.tokenizer),
    }


def _generation(saved: Saved) -> dict[str, Any]:
    known, ids = saved.tokenizer.vocab_size, saved.config.model.vocab_size
    # The model may have more ids than the tokenizer; none of those is text.
    unknown = {"suppress_tokens": list(range(known, ids))} if known < ids else {}
    return {**_special_ids(saved.tokenizer), **unknown, "use_cache": True}


def _special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The end token also starts a text, and pads: see `save_tokenizer`."""
    return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.end_id)


@contextlib.contextmanager
def _whole(out: Path, num_bytes: int) -> Iterator[Path]:
    """A path beside `out`, to write in the block; then it is renamed. A failure leaves nothing.

    Raises:
      InputError: there is no directory for it.
      MachineFailure: the disk is full, or fails.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out={out}: {reason(error)}; name another path") from None
    temporary = out.with_name(f".{out.name[:50]}.{os.getpid()}")
    try:
        try:
            yield temporary
            for path in (*temporary.glob("*"), temporary):
                sync(path)
            os.rename(temporary, out)
            sync(out.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise write_failure(
            error, out, needed=num_bytes, what="the export", stays="nothing of it is left"
        ) from error
