"""Whether a run directory holds what was saved in it: each checkpoint, and the small files beside.

A run that is being trained changes meanwhile: checkpoints that are deleted then are left out.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from inl_jax.config import InputError
from inl_jax.files import read_json
from inl_jax.storage.identity import (
    CONFIG_NAME,
    check_config,
    check_tokenizer,
    newest_identity,
    read_config_file,
    steps_on_disk,
)
from inl_jax.storage.manifest import Damaged, disappears, has_manifest, verify
from inl_jax.storage.retention import read_best
from inl_jax.storage.run_dir import LAST_SAVE
from inl_jax.tokens.tokenizer import FILE_NAME as TOKENIZER_NAME
from inl_jax.tokens.tokenizer import load as load_tokenizer


class Finding(NamedTuple):
    """What was found out about a checkpoint or a file."""

    what: str
    state: Literal["good", "unverified", "damaged"]
    detail: str = ""


def check_checkpoints(run_dir: Path, step: str = "all") -> Iterator[Finding]:
    """Checks checkpoints, oldest first.

    Args:
      run_dir: the run.
      step: "all", "latest", "best", or a saved step.

    Raises:
      InputError: there is no such checkpoint.
    """
    for number in choose_steps(run_dir, step):
        step_dir = run_dir / "checkpoints" / str(number)
        what = f"checkpoint {number}"
        try:
            remark = verify(step_dir)
        except Damaged as error:
            if not disappears(step_dir):
                yield Finding(what, "damaged", str(error))
            continue
        if not has_manifest(step_dir):
            yield Finding(what, "unverified", "it has no manifest")
        elif remark:
            yield Finding(what, "damaged", remark)
        else:
            yield Finding(what, "good")


def find_damaged(run_dir: Path) -> dict[int, str]:
    """The checkpoints of a run that are not as they were saved, and why."""
    damaged = {}
    for step in steps_on_disk(run_dir):
        try:
            verify(run_dir / "checkpoints" / str(step))
        except Damaged as error:
            damaged[step] = str(error)
    return damaged


def choose_steps(run_dir: Path, step: str | int) -> list[int]:
    """The saved steps that a name means: "all", "latest", "best" or a number.

    Raises:
      InputError: there is none.
    """
    steps = steps_on_disk(run_dir)
    named = {"latest": steps[-1:], "best": [read_best(run_dir / "best.json").get("step")]}
    if step == "all":
        return steps
    chosen = named.get(step, [int(step)] if str(step).isdecimal() else [])
    if not chosen or chosen[0] not in steps:
        names = "the names latest and best" if named["best"][0] in steps else "the name latest"
        there = f"{steps}, and {names}" if steps else "none"
        raise InputError(f"{run_dir}: no checkpoint {step!r}; there are {there}")
    return chosen


def check_files(run_dir: Path) -> Iterator[Finding]:
    """Checks the small files of a run, each on its own and against the checkpoints."""
    for name, check in _CHECKS.items():
        if name in _NEEDED and not os.path.lexists(run_dir / name):
            advice = "the next start writes it again, from the newest checkpoint"
            if newest_identity(run_dir) is None:
                advice = "restore it from a copy"
            yield Finding(name, "damaged", f"it is missing; {advice}")
        elif os.path.lexists(run_dir / name):
            try:
                check(run_dir)
            except (InputError, OSError) as error:
                yield Finding(name, "damaged", getattr(error, "strerror", None) or str(error))
            else:
                yield Finding(name, "good")


def _check_config(run_dir: Path) -> None:
    path, saved = run_dir / CONFIG_NAME, newest_identity(run_dir)
    config = read_config_file(path)
    if saved:
        check_config(saved, config, of=path, advice=f"copy {saved / CONFIG_NAME} over it")


def _check_tokenizer(run_dir: Path) -> None:
    path, saved = run_dir / TOKENIZER_NAME, newest_identity(run_dir)
    tokenizer = load_tokenizer(run_dir)
    if saved:
        check_tokenizer(saved, tokenizer, of=path, advice=f"copy {saved / TOKENIZER_NAME} over it")


def _check_best(run_dir: Path) -> None:
    best = read_best(run_dir / "best.json")
    if not best:
        raise InputError("not what training wrote; remove it, and the next start finds the best")
    if best["step"] not in steps_on_disk(run_dir):
        raise InputError(f"names checkpoint {best['step']}, which is not there")


def _check_last_save(run_dir: Path) -> None:
    last = read_json(run_dir / LAST_SAVE).get("step")
    if last not in (steps := steps_on_disk(run_dir)):
        raise InputError(f"names checkpoint {last}, which is not there; there are {steps}")


def _check_metrics(run_dir: Path) -> None:
    *lines, _ = (run_dir / "metrics.jsonl").read_bytes().split(b"\n")  # the last may be cut short
    for i, line in enumerate(lines, start=1):
        if not isinstance(_parsed(line), dict):
            raise InputError(f"line {i} is no JSON object; it is left out on reading")


def _check_env(run_dir: Path) -> None:
    if not isinstance(_parsed((run_dir / "env.json").read_bytes()), dict):
        raise InputError("no JSON object; the next start writes it again")


def _parsed(text: bytes) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


_CHECKS: dict[str, Callable[[Path], None]] = {
    CONFIG_NAME: _check_config,
    TOKENIZER_NAME: _check_tokenizer,
    "best.json": _check_best,
    LAST_SAVE: _check_last_save,
    "metrics.jsonl": _check_metrics,
    "env.json": _check_env,
}
_NEEDED = (CONFIG_NAME, TOKENIZER_NAME)
