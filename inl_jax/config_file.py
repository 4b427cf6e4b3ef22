"""Configs from files and command lines.

A config file is a Python file that assigns one value, `config = TrainConfig(...)`. Its docstring is
a lab note. Single fields are overridden as `--section.field value`.
"""

import ast
import contextlib
import dataclasses
import io
import itertools
import re
import runpy
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from inl_jax.config import InputError, TrainConfig

# Held while a file runs and a command line is parsed: both change what the whole process shares
# (`redirect_stderr` swaps sys.stderr, `run_path` sys.argv). A config file may load another one.
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
    file = Path(path)
    if not file.is_file():
        known = presets()
        if str(path) not in known:
            raise InputError(
                f"config {path}: no such file, and no config has that name; choose one of "
                f"{', '.join(known)}"
            )
        file = known[str(path)]
    try:
        with _lock:
            values = runpy.run_path(str(file))
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"config {file}: {type(error).__name__}: {error}") from error
    config = values.get("config")
    if not isinstance(config, TrainConfig):
        raise InputError(f"config {file}: must assign `config = TrainConfig(...)`")
    return override(config, overrides)


def override(config: TrainConfig, overrides: Sequence[str]) -> TrainConfig:
    """`config` with the fields named on a command line replaced.

    Raises:
      InputError: as `load_config` does.
      SystemExit: after `--help`, which prints every field.
    """
    import tyro  # late: listing the configs needs none of it

    args = [
        f"--{arg}" if _assigns(arg, previous) else arg
        for previous, arg in itertools.pairwise(["", *overrides])
    ]
    complaint = io.StringIO()
    try:
        with _lock, contextlib.redirect_stderr(complaint):
            return tyro.cli(
                TrainConfig,
                default=config,
                args=args,
                prog="",
                use_underscores=True,
                config=(tyro.conf.FlagConversionOff,),
            )
    except SystemExit as stop:
        if stop.code == 0:  # --help was printed
            raise
        raise InputError(_one_line(complaint.getvalue())) from None


def _assigns(arg: str, previous: str) -> bool:
    """Whether `arg` is field=value, and not the value of the flag `previous` with a = in it."""
    field, equals, _ = arg.partition("=")
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    known = re.fullmatch(r"\w+(\.\w+)?", field) and field.partition(".")[0] in names
    return bool(equals and known and not (previous.startswith("--") and "=" not in previous))


def _one_line(boxed: str) -> str:
    """Tyro's framed complaint as one line, without its pointer to --help."""
    text = " ".join(re.sub(r"[╭╮╰╯│─]+", " ", boxed).split())
    text = text.split(" For full helptext")[0].split(" Argument helptext")[0]
    text = re.sub(r"^(Value error|Parsing error|Invalid choice|Unrecognized options) ", "", text)
    return re.sub(r"^Error parsing \w+: ", "", text)
