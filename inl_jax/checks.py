"""Mistakes in the input: `InputError`, and the checks of a config's fields that raise it."""

import dataclasses
import typing
from typing import Any, Literal


class InputError(ValueError):
    """A mistake in the input: one line that names the thing, the value found and what to do."""


def require(condition: bool, message: str) -> None:
    """Raises `InputError(message)` unless `condition` holds."""
    if not condition:
        raise InputError(message)


def check_types(section: Any, prefix: str) -> None:
    """Checks the types of fields: a config file does not go through the command line's parser."""
    for field in dataclasses.fields(section):
        value, name = getattr(section, field.name), f"{prefix}{field.name}"
        kind = field.type
        if typing.get_origin(kind) is Literal:
            choices = typing.get_args(kind)
            require(value in choices, f"{name}={value}: choose one of {', '.join(choices)}")
        elif kind in (int, float, str):
            fits = isinstance(value, (int, float) if kind is float else kind)
            require(
                fits and not isinstance(value, bool),
                f"{name}={value!r}: must be of type {kind.__name__}",
            )
        elif typing.get_origin(kind) is tuple:
            require(
                isinstance(value, tuple), f"{name}={value!r}: must be a tuple, such as ({value!r},)"
            )
            inner = typing.get_args(kind)[0]
            if typing.get_origin(inner) is Literal:
                choices = typing.get_args(inner)
                for item in value:
                    require(item in choices, f"{name}={item!r}: choose among {', '.join(choices)}")
                continue
            for item in value:
                require(
                    isinstance(item, (int, float) if inner is float else inner)
                    and not isinstance(item, bool),
                    f"{name}={value!r}: every item must be of type {inner.__name__}",
                )


def require_positive(section: Any, prefix: str, names: str) -> None:
    """Requires the fields `names`, separated by spaces, to be above 0."""
    for name in names.split():
        value = getattr(section, name)
        require(value > 0, f"{prefix}{name}={value}: must be positive")


def require_not_negative(section: Any, prefix: str, names: str) -> None:
    """Requires the fields `names`, separated by spaces, to be 0 or above."""
    for name in names.split():
        value = getattr(section, name)
        require(value >= 0, f"{prefix}{name}={value}: must be 0 or more")
