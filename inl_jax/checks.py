"""Mistakes in the input: `InputError`, and the checks of a config's fields that raise it."""

import dataclasses
import numbers
import os
import typing
from collections.abc import Iterator
from typing import Any, Literal

from inl_jax.failures import EXIT_MISTAKE

LONGEST_MESSAGE = 1000  # characters: a value may be as long as a text


class InputError(ValueError):
    """A mistake in the input: one line that names the thing, the value found and what to do."""

    exit_code = EXIT_MISTAKE

    def __init__(self, message: str):
        """Makes one line of `message`, whatever values stand in it."""
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """`text` with line breaks and control characters escaped; cut in the middle if it is long."""
    if len(text) > LONGEST_MESSAGE:
        half = LONGEST_MESSAGE // 2
        text = f"{text[:half]} ... {text[-half:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: Any) -> str:
    """`repr(value)`, or its type if that fails, as for an integer of 5,000 digits."""
    try:
        return repr(value)
    except Exception:
        return f"({type(value).__name__})"


def require(condition: bool, message: str) -> None:
    """Raises `InputError(message)` unless `condition` holds."""
    if not condition:
        raise InputError(message)


def check_types(section: Any, prefix: str) -> None:
    """Checks the types of fields: a config file does not go through the command line's reader.

    Values that are as good become plain Python, so that they can be recorded: NumPy's numbers,
    paths for texts, lists for tuples.
    """
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        plain = _plain(value, field.type, f"{prefix}{field.name}={shown(value)}")
        object.__setattr__(section, field.name, plain)  # the section is frozen


def _plain(value: Any, kind: Any, found: str) -> Any:
    """`value` as the type `kind` of a field; `found` is how messages begin."""
    origin, choices = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        require(
            isinstance(value, tuple | list), f"{found}: must be a tuple, such as ({shown(value)},)"
        )
        return tuple(_plain(item, choices[0], f"{found}: {shown(item)}") for item in value)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if origin is typing.Union:  # a number or a word, such as int | Literal["auto"]
        kind, words = choices[0], typing.get_args(choices[1])
        if isinstance(value, str):
            either = f"{found}: must be of type {kind.__name__}, or {' or '.join(words)}"
            require(value in words, either)
            return value
    if origin is Literal:
        fits = isinstance(value, str) and value in choices
        require(fits, f"{found}: choose one of {', '.join(choices)}")
    elif kind in (int, float):
        number = numbers.Integral if kind is int else numbers.Real
        fits = isinstance(value, number) and not isinstance(value, bool)
        require(fits, f"{found}: must be of type {kind.__name__}")
        require(kind is float or abs(value) < 2**63, f"{found}: does not fit into 64 bits")
        try:
            return kind(value)
        except OverflowError:
            raise InputError(f"{found}: is larger than any float") from None
    else:
        require(
            type(value) is kind or kind is str and isinstance(value, str),
            f"{found}: must be of type {kind.__name__}",
        )
    return value


def require_positive(section: Any, prefix: str, names: str) -> None:
    """Requires the fields `names`, separated by spaces, to be above 0."""
    for name, value in _numbers(section, names):
        require(value > 0, f"{prefix}{name}={value}: must be positive")


def require_not_negative(section: Any, prefix: str, names: str) -> None:
    """Requires the fields `names`, separated by spaces, to be 0 or above."""
    for name, value in _numbers(section, names):
        require(value >= 0, f"{prefix}{name}={value}: must be 0 or more")


def require_at_most(section: Any, prefix: str, limit: float, names: str) -> None:
    """Requires the fields `names`, separated by spaces, not to exceed `limit`."""
    for name, value in _numbers(section, names):
        require(value <= limit, f"{prefix}{name}={value}: must be at most {limit:,}")


def _numbers(section: Any, names: str) -> Iterator[tuple[str, int | float]]:
    """The fields `names` and their values, but for fields that hold a word, such as auto."""
    for name in names.split():
        value = getattr(section, name)
        if not isinstance(value, str):
            yield name, value
