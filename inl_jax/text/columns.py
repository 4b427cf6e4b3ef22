"""Which columns of a row are its text, and what to do with rows whose text stands elsewhere."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from inl_jax.config import InputError

_USUAL = (("content",), ("text",), ("code",), ("data",), ("prompt", "completion"))
# Columns that hold a part of a text each, or one of two answers.
_PARTS = frozenset(
    "instruction instructions system context input inputs prompt question query problem output "
    "outputs completion response answer solution target targets chosen rejected".split()
)
_TURN_KEYS = {"role", "from", "speaker", "author"}  # of a turn in a conversation
_LISTED = 20  # names in an error


class MissingColumn(InputError):
    """`data.column` names a column that the rows do not have."""


class RowText(NamedTuple):
    """The text of one row."""

    text: str
    missing: str
    """all, half or nothing of the text; a row of which anything is missing is no document."""
    bad: int
    """Lone surrogates replaced by U+FFFD."""


def text_columns(rows: Sequence[dict[str, Any]], wanted: str, where: str) -> tuple[str, ...]:
    """The columns whose values, joined, are the text.

    Args:
      rows: some rows of the source; where they do not have one column of text alone, the usual one
        with text in most of them is taken, the first of equals.
      wanted: `data.column`; if empty, the usual names are tried. Upper and lower case are alike
        unless a name fits exactly.
      where: the place of the first row, for the error.

    Raises:
      InputError: there is no such column.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    choices = _choices(names, wanted)
    if choices:
        return max(choices, key=lambda choice: sum(_is_full(row, choice) for row in rows))
    if wanted:
        raise MissingColumn(f"{where}: no column {wanted}; {_advice(rows)}")
    for row in rows:
        for name, value in row.items():
            if _is_conversation(value):
                raise InputError(f"{where}: {_not_text(name, value, rows)}")
    raise InputError(f"{where}: no text column; {_advice(rows)}")


def usable_columns(names: Iterable[str], wanted: str) -> list[str]:
    """Those of `names` that `text_columns` may choose among."""
    return list(dict.fromkeys(name for choice in _choices(list(names), wanted) for name in choice))


def row_text(
    row: dict[str, Any], columns: tuple[str, ...], where: str, *, bad_utf8: str
) -> RowText:
    """The text in the columns of a row, joined.

    Raises:
      InputError: the row has none of the columns, a value is not text, or, if `bad_utf8` is
        "error", holds half of a surrogate pair.
    """
    if not any(column in row for column in columns):
        raise InputError(
            f"{where}: no column {' or '.join(columns)}, which other rows have (this one: "
            f"{_listed(row)}); give every row the same columns"
        )
    values = [row.get(column) for column in columns]
    for column, value in zip(columns, values, strict=True):
        if not isinstance(value, str | None):
            raise InputError(f"{where}: {_not_text(column, value, [row])}")
    # JSON can spell half of a surrogate pair, which no UTF-8 can hold.
    text, lone = re.subn("[\ud800-\udfff]", "\ufffd", "".join(value or "" for value in values))
    if lone and bad_utf8 == "error":
        raise InputError(
            f"{where}: half of a surrogate pair; mend the row, or set data.bad_utf8=replace"
        )
    missing = "" if all(values) else "half" if text else "all"
    return RowText(text, missing, lone)


def _choices(names: list[str], wanted: str) -> list[tuple[str, ...]]:
    """The usual combinations of columns, or the wanted column, as far as they are among `names`."""
    by_lower_case = {name.lower(): name for name in reversed(names)} | {n: n for n in names}
    usual = [(wanted if wanted in names else wanted.lower(),)] if wanted else _USUAL
    return [
        tuple(by_lower_case[name] for name in choice)
        for choice in usual
        if all(name in by_lower_case for name in choice)
    ]


def _is_full(row: dict[str, Any], columns: tuple[str, ...]) -> bool:
    return all(isinstance(row.get(column), str) and row[column] for column in columns)


def _is_conversation(value: Any) -> bool:
    turn = value[0] if isinstance(value, list) and value else value
    return isinstance(turn, dict) and not _TURN_KEYS.isdisjoint(turn)


def _not_text(column: str, value: Any, rows: Sequence[dict[str, Any]]) -> str:
    if _is_conversation(value):
        return (
            f"column {column} holds a conversation, not text; join the turns of each into one "
            "text, in a column text (apply_chat_template(..., tokenize=False) of transformers does)"
        )
    kinds = {list: "a list", dict: "an object", tuple: "two values", bool: "true or false"}
    kind = kinds.get(
        type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}"
    )
    return f"column {column} holds {kind}, not text; {_advice(rows)}"


def _advice(rows: Sequence[dict[str, Any]]) -> str:
    """What to do with rows whose text is in none of the columns looked at."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    texts = [name for name in names if any(_is_full(row, (name,)) for row in rows)]
    parts = [name for name in names if name.lower() in _PARTS]
    if len(parts) > 1:
        return f"the text is in parts ({_listed(parts)}): write all of it into a column text"
    if texts:
        return f"set data.column to one of: {_listed(texts)}"
    return f"write the text of each row into a column text (there are: {_listed(names)})"


def _listed(names: Iterable[str]) -> str:
    names = [" ".join(name.split())[:40] for name in names]
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
