"""Configs as text: files, command lines, JSON.

A config file is a Python file that assigns one value, `config = TrainConfig(...)`. Its docstring is
a lab note. Single fields are overridden as `--section.field value`.
"""

import ast
import contextlib
import dataclasses
import itertools
import json
import math
import re
import runpy
import threading
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from inl_jax.checks import require, shown
from inl_jax.config import InputError, Phase, TrainConfig, field_types, with_fields
from inl_jax.files import json_text, user_path
from inl_jax.other_names import answer_to, check_names

# Held while a file runs, because `run_path` changes sys.argv, which the whole process shares. A
# config file may load another one.
_lock = threading.RLock()


class LabNote(NamedTuple):
    """What a config file says of itself; read, not computed."""

    num_params: int
    count: str  # the same for people: 1.70B
    memory: str  # of training on one device, in GiB


def presets() -> dict[str, Path]:
    """The configs that come with the project, by name ("tiny", "3b", ...)."""
    here = Path(__file__).parent
    folder = next(f for f in (here / "configs", here.parent / "configs") if f.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


def read_lab_note(path: Path) -> LabNote:
    """The figures in the docstring of a config file, without running the file.

    Its first line is `NAME: 1,698,414,592 parameters (1.70B), ...`; a line below begins with
    `Memory     34.3 GiB`, or `Memory     12.6 GiB and 19.0 GiB of host memory`.
    """
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    size = re.match(r"\w+: ([\d,]+) parameters \(([^)]+)\)", text)
    memory = re.search(r"^Memory +([\d.]+ GiB(?: and [\d.]+ GiB of host memory)?)", text, re.M)
    assert size and memory, f"{path}: the lab note does not give parameters and memory"
    return LabNote(int(size[1].replace(",", "")), size[2], memory[1])


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a config file and applies overrides.

    Args:
      path: a Python file that assigns `config = TrainConfig(...)`, or the name of a config that
        comes with the project ("3b").
      overrides: `["--optim.learning_rate", "3e-5"]`, `["optim.learning_rate=3e-5"]`, or both mixed.

    Raises:
      InputError: one line; the file cannot be read, or a field is unknown, of the wrong type or
        impossible.
    """
    file = user_path(path, "config")
    if not file.is_file():
        known = presets()
        if str(path) not in known:
            there = "no config file" if file.exists() else "no such file"
            raise InputError(
                f"config {path}: {there}, and no config has that name; choose one of "
                f"{', '.join(known)}"
            )
        file = known[str(path)]
    try:
        with _lock:
            values = runpy.run_path(str(file))
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"config {file}: {type(error).__name__}: {error}") from error
    config = values.get("config")
    if type(config) is not TrainConfig:
        raise InputError(f"config {file}: must assign `config = TrainConfig(...)`")
    return override(config, overrides)


def override(config: TrainConfig, overrides: Sequence[str]) -> TrainConfig:
    """`config` with the fields named on a command line replaced.

    Raises:
      InputError: as `load_config` does.
    """
    words = [overrides] if isinstance(overrides, str) else list(overrides)
    require(
        words == list(overrides) and all(isinstance(word, str) for word in words),
        f"overrides={shown(overrides)}: must be a list of texts, such as ['batch_size=8']",
    )
    args = [
        f"--{word}" if _assigns(word, previous) else word
        for previous, word in itertools.pairwise(["", *words])
    ]
    check_names(args, own=())
    given: dict[str, list[str]] = {}
    for arg in args:
        if arg.startswith("--"):
            name, equals, value = arg[2:].partition("=")
            given[name] = [value] if equals else []
        elif given:
            given[name].append(arg)
        else:
            raise InputError(f"{arg}: no flag stands before it; write --section.field value")
    kinds = field_types()
    return with_fields(config, {name: _read(name, kinds[name], v) for name, v in given.items()})


def _read(name: str, kind: Any, words: list[str]) -> Any:
    """The value that words give a field. A word that is of another type stays a text.

    The check of the field then says what is wrong with it.
    """
    if typing.get_origin(kind) is tuple:
        return tuple(_read(name, typing.get_args(kind)[0], [word]) for word in words)
    require(len(words) == 1, f"--{name} {' '.join(words)}: takes one value")
    (word,) = words
    if kind is Phase:
        return Phase.parse(word)
    for number in (int, float):
        if kind is number or number in typing.get_args(kind):
            with contextlib.suppress(ValueError):
                return number(word)
    return word


def as_overrides(old: TrainConfig, new: TrainConfig) -> list[str]:
    """The words of a command line that make `new` of `old`, for `override`."""
    words = []
    for name, _, value in differences(old, new):
        words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def _assigns(arg: str, previous: str) -> bool:
    """Whether `arg` is field=value, and not the value of the flag `previous` with a = in it.

    A name that other programs give a field counts, so that it is answered with ours.
    """
    field, equals, _ = arg.partition("=")
    if not (equals and re.fullmatch(r"\w+(\.\w+)?", field)):
        return False
    known = field.partition(".")[0] in {f.name for f in dataclasses.fields(TrainConfig)}
    is_value = previous.startswith("--") and "=" not in previous
    return (known or bool(answer_to(field))) and not is_value


def to_json(config: TrainConfig) -> str:
    """`config` as a JSON object, sections as nested objects; an infinite number as "inf"."""

    def spelled(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: spelled(item) for name, item in value.items()}
        return str(value) if isinstance(value, float) and math.isinf(value) else value

    return json_text(spelled(dataclasses.asdict(config)), indent=2)


def from_json(text: str) -> TrainConfig:
    """The inverse of `to_json`.

    Raises:
      InputError: the JSON is not of a config, or has fields that do not exist; they are named.
    """

    def build(cls: type, values: Any, prefix: str) -> Any:
        require(isinstance(values, dict), f"{prefix[:-1]}={shown(values)}: must be an object")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = [f"{prefix}{name}" for name in values if name not in fields]
        if unknown:
            raise InputError(f"unknown config fields {', '.join(unknown)}: remove them")
        return cls(**{n: read(fields[n].type, v, f"{prefix}{n}.") for n, v in values.items()})

    def read(kind: Any, value: Any, prefix: str) -> Any:
        if dataclasses.is_dataclass(kind):
            return build(kind, value, prefix)
        if isinstance(value, list) and typing.get_origin(kind) is tuple:
            return tuple(read(typing.get_args(kind)[0], item, prefix) for item in value)
        return math.inf if kind is float and value == "inf" else value

    values = json.loads(text)
    if not (isinstance(values, dict) and "model" in values):
        raise InputError("this is not the JSON of a config")
    if "sample_prompt" in values:  # one prompt, before there were several
        values["sample_prompts"] = [values.pop("sample_prompt")]
    return build(TrainConfig, values, "")


def differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields (dotted field, old value, new value) for each field in which two configs differ.

    Phases are given as on a command line.
    """
    for field in dataclasses.fields(old):
        a, b = getattr(old, field.name), getattr(new, field.name)
        if dataclasses.is_dataclass(a):
            yield from differences(a, b, f"{prefix}{field.name}.")
        elif a != b and field.name == "phases":
            yield f"{prefix}phases", *(" ".join(map(str, phases)) or "none" for phases in (a, b))
        elif a != b:
            yield f"{prefix}{field.name}", a, b
