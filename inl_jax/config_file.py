"""Configs from files and command lines.

A config file is a Python file that assigns one value, `config = TrainConfig(...)`. Single fields
are overridden as `--section.field value`.
"""

import contextlib
import dataclasses
import io
import itertools
import re
import runpy
from collections.abc import Sequence
from pathlib import Path

import tyro

from inl_jax.config import InputError, TrainConfig


def presets() -> dict[str, Path]:
    """The configs that come with the project, by name ("tiny", "3b", ...)."""
    here = Path(__file__).parent
    folder = next(f for f in (here / "configs", here.parent / "configs") if f.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a config file and applies overrides.

    Args:
      path: a Python file that assigns `config = TrainConfig(...)`, or the name of one that comes
        with the project ("3b").
      overrides: `["--optim.learning_rate", "3e-5"]`, `["optim.learning_rate=3e-5"]`, or both mixed.

    Raises:
      InputError: one line, for a file that cannot be read or a field that is unknown, of the wrong
        type or impossible.
    """
    file = Path(path)
    if not file.is_file():
        known = presets()
        if str(path) not in known:
            raise InputError(
                f"config {path}: no such file, and no config of that name "
                f"(there are {', '.join(known)})"
            )
        file = known[str(path)]
    try:
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
    """`config` with the fields named on a command line replaced. Raises as `load` does."""
    args = [
        f"--{arg}" if _assigns(arg, after) else arg
        for after, arg in itertools.pairwise(["", *overrides])
    ]
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
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


def _assigns(arg: str, after: str) -> bool:
    """Whether `arg` is field=value, and not a value of the flag `after` that has a = in it."""
    field, equals, _ = arg.partition("=")
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    known = re.fullmatch(r"\w+(\.\w+)?", field) and field.partition(".")[0] in names
    return bool(equals and known and not (after.startswith("--") and "=" not in after))


def _one_line(boxed: str) -> str:
    """Tyro's framed complaint as one line, without its pointer to --help."""
    text = " ".join(re.sub(r"[╭╮╰╯│─]+", " ", boxed).split())
    text = text.split(" For full helptext")[0].split(" Argument helptext")[0]
    text = re.sub(r"^(Value error|Parsing error|Invalid choice|Unrecognized options) ", "", text)
    return re.sub(r"^Error parsing \w+: ", "", text)
