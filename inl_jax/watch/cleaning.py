"""What can be read of a run's files: values without the type that they should have are left out."""

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from inl_jax.files import read_json
from inl_jax.training.metrics import Record
from inl_jax.watch.integrator_probe import QUANTITIES


def clean_records(records: Sequence[Record]) -> tuple[list[Record], int]:
    """The records without damaged values, and how many records had one.

    A record without a whole step is dropped. Numbers that are not finite become None, which is no
    damage; so do those near the largest float, which overflow in other units.
    """
    cleaned = [
        {k: _or_none(v) for k, v in record.items() if _holds(_TYPES.get(k, _is_number), v)}
        for record in records
    ]
    shapes = [np.shape(r["dynamics"]["alpha"]) for r in cleaned if "dynamics" in r]
    for record in cleaned:
        if "dynamics" in record and np.shape(record["dynamics"]["alpha"]) != shapes[-1]:
            del record["dynamics"]
    damaged = sum(len(found) < len(r) for found, r in zip(cleaned, records, strict=True))
    return [record for record in cleaned if "step" in record], damaged


def read_files(run_dir: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The contents of config.json, env.json and best.json, and the names of those damaged.

    A file that is missing or damaged gives an empty dictionary.
    """
    found = {name: read_json(run_dir / name) for name in _FILES}
    damaged = [name for name, of in found.items() if of and not _holds(_FILES[name], of)]
    return [{} if name in damaged else of for name, of in found.items()], damaged


def _holds(check: Callable[[Any], bool], value: Any) -> bool:
    try:
        return check(value)
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
        return False


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_number(value: Any) -> bool:
    return value is None or type(value) is float or (type(value) is int and abs(value) < 2**63)


def _are_texts(*values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


def _is_dynamics(value: Any) -> bool:
    (shape,) = {np.array(value[name], float).shape for name in QUANTITIES}
    return len(shape) == 2 and 0 not in shape


def _is_start(start: Any) -> bool:
    devices = start["devices"]
    datetime.fromisoformat(start["time"]).timestamp()
    return _is_count(devices["count"]) and _are_texts(
        start["time"], start["host"], start["command"], devices["kind"]
    )


def _or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not abs(value) < 1e300 else value


_TYPES = {  # of the fields of a record; the others are numbers
    "step": _is_count,
    "time": lambda value: 0 <= value < 1e11,  # to the year 5138
    "best": lambda value: isinstance(value, bool),
    "verdict": _are_texts,
    "basis": _are_texts,
    "dynamics": _is_dynamics,
    "sources": lambda value: all(_is_number(of["loss"]) for of in value.values()),
    "samples": lambda value: all(_are_texts(s["prompt"], s["greedy"], s["sampled"]) for s in value),
}
_FILES = {
    "config.json": lambda value: _is_count(value["data"]["seq_len"]),
    "env.json": lambda value: all(map(_is_start, value["starts"])),
    "best.json": lambda value: _is_count(value["step"]),
}
