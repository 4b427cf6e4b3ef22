"""An exported model's directory, read: config.json and safetensors, and never a pickle.

`inl export` writes such a directory, and so does `save_pretrained` of transformers.
"""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from inl_jax.checks import InputError, require
from inl_jax.config import ModelConfig
from inl_jax.console import first_line, plural
from inl_jax.interop.exported_config import from_json_fields
from inl_jax.interop.named_weights import named_leaves, weights_of
from inl_jax.parallel.sharding import put
from inl_jax.storage.identity import steps_on_disk

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_TYPES = ("BF16", "F16", "F32", "F64")


class _Array(NamedTuple):
    """An array as the header of its file describes it."""

    file: Path
    shape: tuple[int, ...]
    type: str  # as in `_TYPES`


@dataclasses.dataclass(frozen=True)
class ExportedWeights:
    """The weights of an exported model, checked by their headers; none is read yet."""

    directory: Path
    model: ModelConfig
    """The architecture; its parameters are bfloat16 if all weights are, else float32."""
    arrays: dict[str, _Array]

    def __str__(self) -> str:
        types = ", ".join(sorted({array.type for array in self.arrays.values()}))
        files = plural(len({array.file for array in self.arrays.values()}), "file")
        return f"an exported model ({len(self.arrays)} arrays of type {types} in {files})"

    def read(self, param_dtype: str, shardings: Any) -> Any:
        """The parameters in `param_dtype`. The host holds one stacked leaf at a time.

        Args:
          param_dtype: as `ModelConfig.param_dtype`.
          shardings: one for each parameter.

        Raises:
          InputError: a weight is not finite, or the head is not the embedding.
        """
        with contextlib.ExitStack() as stack:
            paths = {array.file for array in self.arrays.values()}
            files = {path: stack.enter_context(_open(path)) for path in paths}

            def stored(name: str) -> np.ndarray:
                return files[self.arrays[name].file].get_tensor(name)

            def get(name: str) -> np.ndarray:
                weight = stored(name).astype(jnp.dtype(param_dtype), copy=False)
                require(
                    bool(np.isfinite(weight).all()),
                    f"{self.directory}: {name} holds NaN or infinity as {param_dtype}: take "
                    "weights from before they diverged",
                )
                return weight

            require(
                HEAD not in self.arrays or np.array_equal(stored(HEAD), stored(EMBEDDING)),
                f"{self.directory}: {HEAD} differs from {EMBEDDING}: they are one weight in this "
                "model; tie them and train again",
            )
            leaves = named_leaves(get, self.model)
            placed = map(put, leaves, jax.tree.leaves(shardings))
            return jax.tree.unflatten(jax.tree.structure(shardings), placed)


def is_exported(path: Path) -> bool:
    """Whether a directory holds a model as transformers does, rather than a run or nothing."""
    if not path.is_dir() or steps_on_disk(path):
        return False
    if any(path.glob("*.safetensors*")) or any(path.glob("pytorch_model*")):
        return True
    config = path / CONFIG_NAME
    return config.is_file() and b'"model_type"' in config.read_bytes()


def open_exported(directory: str | Path) -> ExportedWeights:
    """Reads the config and the headers of an exported model.

    Raises:
      InputError: a file is missing or damaged, is a pickle or a pointer of Git LFS; the model is
        another; or an array is missing, left over, or of another shape or type.
    """
    directory = Path(directory)
    if not (directory / CONFIG_NAME).exists() and (directory / "adapter_config.json").exists():
        raise InputError(
            f"{directory}: holds an adapter of PEFT, not a model; save what merge_and_unload() "
            "gives, and name that directory"
        )
    fields = _read_object(directory / CONFIG_NAME)
    model = from_json_fields(fields, param_dtype="float32", of=str(directory / CONFIG_NAME))
    arrays = _find_arrays(directory)
    _check_arrays(arrays, model, directory)
    if all(array.type == "BF16" for array in arrays.values()):
        model = dataclasses.replace(model, param_dtype="bfloat16")
    return ExportedWeights(directory, model, arrays)


def refuse_pointer(path: Path) -> None:
    """Raises `InputError` if Git LFS has left a pointer in place of a file."""
    with open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise InputError(f"{path}: a pointer of Git LFS, not the data; run: git lfs pull")


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    require(path.is_file(), f"{path}: no such file; export the model again, or copy it whole")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)}); copy it again") from None
    require(isinstance(found, dict), f"{path}: holds no JSON object; copy it again")
    return found


def _find_arrays(directory: Path) -> dict[str, _Array]:
    """The arrays of one file, or of the shards that the index names."""
    single, index = directory / WEIGHTS_NAME, directory / INDEX_NAME
    if single.exists():
        return _headers(single)
    if not index.exists():
        pickle = next((p.name for p in sorted(directory.iterdir()) if p.suffix in _PICKLES), None)
        raise InputError(
            f"{directory / pickle}: a pickle, which could run code; save the model with "
            "save_pretrained, as safetensors"
            if pickle
            else f"{directory}: has no {WEIGHTS_NAME} and no {INDEX_NAME}; export the model again"
        )
    places = _read_object(index).get("weight_map")
    for name, shard in places.items() if isinstance(places, dict) else [("weight_map", places)]:
        require(
            isinstance(shard, str) and shard == Path(shard).name and shard.endswith(".safetensors"),
            f"{index}: {name} is in {shard!r}, which is no file beside it; copy the index again",
        )
    found: dict[str, _Array] = {}
    for shard in sorted(set(places.values())):
        path = directory / shard
        require(path.exists(), f"{path}: missing, and the index names it; copy it here")
        found |= _headers(path)
    wrong = [name for name in places if name not in found or found[name].file.name != places[name]]
    wrong += [name for name in found if name not in places]
    require(
        not wrong,
        f"{index}: {_some(wrong)} {'is' if len(wrong) == 1 else 'are'} not where the index says; "
        "copy index and shards of one export",
    )
    return found


def _headers(path: Path) -> dict[str, _Array]:
    found = {}
    with _open(path) as file:
        for name in file.keys():  # noqa: SIM118, not a dictionary
            header = file.get_slice(name)
            found[name] = _Array(path, tuple(header.get_shape()), header.get_dtype())
    return found


def _open(path: Path) -> Any:
    """The safetensors file, mapped into memory; a context that closes it."""
    try:
        from safetensors import safe_open
    except ImportError:
        raise InputError(f"{path}: needs safetensors; pip install 'inl_jax[hf]'") from None
    try:
        refuse_pointer(path)
        return safe_open(path, "numpy")
    except InputError:
        raise
    except Exception as error:  # the library's own type, and those of the system
        raise InputError(f"{path}: damaged ({first_line(error)}); copy it again") from None


def _check_arrays(arrays: dict[str, _Array], model: ModelConfig, directory: Path) -> None:
    wanted = {weight.name: weight.exported_shape for weight in weights_of(model)}
    missing = [name for name in wanted if name not in arrays]
    require(not missing, f"{directory}: lacks {_some(missing)}; export the model again")
    left_over = [name for name in arrays if name not in wanted and name != HEAD]
    require(
        not left_over,
        f"{directory}: {CONFIG_NAME} has no place for {_some(left_over)}; take the {CONFIG_NAME} "
        "that was saved with these weights",
    )
    for name, array in arrays.items():
        shape = wanted[EMBEDDING if name == HEAD else name]
        require(
            array.shape == shape,
            f"{array.file}: {name} has shape {array.shape}, {CONFIG_NAME} wants {shape}; take the "
            f"{CONFIG_NAME} that was saved with these weights",
        )
        require(
            array.type in _TYPES,
            f"{array.file}: {name} is of type {array.type}; save it as one of {', '.join(_TYPES)}",
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
