"""A config as `--help` shows it: the fields that most people need, and all of them in groups.

The text of a field is the docstring under it in config.py.
"""

import argparse
import ast
import dataclasses
import functools
import inspect
import itertools
import shlex
import textwrap
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from inl_jax.config import TrainConfig

WIDTH = 100  # columns
TEXT = 40  # the column where the text of most flags begins
GROUPS = ("run", "model", "data", "optim", "mesh")
HELP = ("short", *GROUPS, "all")
"""What `--help` takes; short by default."""


class Flag(NamedTuple):
    """One flag as `--help` shows it."""

    name: str
    kind: str  # what its value looks like; empty for a switch
    default: str
    doc: str

    def head(self) -> str:
        """`--model.d_model INT (128)`."""
        parts = [self.name, self.kind, self.default and f"({self.default})"]
        return "  " + " ".join(filter(None, parts))

    def line(self) -> str:
        """One line: the flag, and as much of its first sentence as there is room for."""
        head = "  " + textwrap.shorten(self.head(), 70, placeholder=" ...)")
        return _cut(head.ljust(TEXT - 2), self.doc.partition(". ")[0].removesuffix("."))

    def paragraph(self) -> str:
        """The flag, and all of its text below."""
        fill = functools.partial(
            textwrap.fill, width=WIDTH, subsequent_indent=" " * 6, break_on_hyphens=False
        )
        return fill(self.head()) + "\n" + fill(self.doc, initial_indent=" " * 6)


def help_text(
    parser: argparse.ArgumentParser, config: TrainConfig, first: Sequence[str], *, about: str
) -> str:
    """What `--help` prints.

    Args:
      parser: of the verb; has `--config` among its flags.
      config: its values are shown beside the flags.
      first: the fields that most people need.
      about: one of HELP. short: `first`, the flags of the verb, and the names of the groups. A
        group: its fields with all of their text. all: a line for each field.
    """
    if about == "short":
        return _short_help(parser, config, first)
    if about == "all":
        return "\n\n".join(_listed(config, group, Flag.line) for group in GROUPS)
    return _listed(config, about, Flag.paragraph)


def _short_help(parser: argparse.ArgumentParser, config: TrainConfig, first: Sequence[str]) -> str:
    fields = {flag.name: flag for group in GROUPS for flag in group_flags(config, group)}
    own = {flag.name: flag for flag in verb_flags(parser)}
    shown = [own.pop("--config"), *(fields[f"--{name}"] for name in first), *own.values()]
    lines = [
        f"usage: {parser.prog} --config NAME [--flag value ...]",
        "",
        parser.description.strip(),
        "",
        *map(Flag.line, shown),
        "",
        f"Every field of a config is a flag; in brackets: its value in {config.name}. In groups:",
        "",
        *(_cut(f"  {parser.prog} --help {group:5}", _about(config, group)) for group in GROUPS),
        f"  {parser.prog} --help all    Each of them in one line.",
    ]
    return "\n".join(lines)


def _listed(config: TrainConfig, group: str, layout: Callable[[Flag], str]) -> str:
    title = f"{group}: {_about(config, group)}"
    return "\n".join([title, "", *map(layout, group_flags(config, group))])


def _cut(head: str, text: str) -> str:
    """`head`, and as much of `text` as one line has room for."""
    text = textwrap.shorten(text, WIDTH - 2 - len(head), placeholder=" ...")
    return f"{head}  {text}".rstrip()


def _about(config: TrainConfig, group: str) -> str:
    section = config if group == "run" else getattr(config, group)
    return inspect.getdoc(type(section)).partition("\n")[0]


def group_flags(config: TrainConfig, group: str) -> list[Flag]:
    """The fields of a section; group `run` holds those that stand in none."""
    section, prefix = (config, "") if group == "run" else (getattr(config, group), f"{group}.")
    docs = field_docs(type(section))
    return [
        Flag(
            f"--{prefix}{field.name}",
            kind_of(field.type),
            _shown(getattr(section, field.name)),
            docs[field.name],
        )
        for field in dataclasses.fields(section)
        if not dataclasses.is_dataclass(field.type)
    ]


def verb_flags(parser: argparse.ArgumentParser) -> Iterator[Flag]:
    """The flags that a verb has beside the fields of the config."""
    for name, action in parser._option_string_actions.items():
        if not name.startswith("--") or name == "--help":
            continue
        kind = "" if action.nargs == 0 else action.metavar or kind_of(action.type or str)
        if action.choices:
            kind = kind_of(Literal[tuple(action.choices)])
        kind = {"?": f"[{kind}]", "+": f"{kind} ..."}.get(action.nargs, kind)
        text = action.help or ""
        yield Flag(name, kind, _shown(action.default or ""), text[:1].upper() + text[1:])


def kind_of(kind: Any) -> str:
    """A type as a command line shows it: INT, STR ..., {cosine,wsd,constant}."""
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return "{" + ",".join(inner) + "}"
    if typing.get_origin(kind) is tuple:
        return f"{kind_of(inner[0])} ..."
    return "|".join(map(kind_of, inner)) or kind.__name__.upper()


def _shown(value: Any) -> str:
    return shlex.join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def field_docs(section: type) -> dict[str, str]:
    """The docstring under each field as one line; from the source, since Python drops them."""
    (tree,) = ast.parse(inspect.getsource(section)).body
    return {
        field.target.id: " ".join(doc.value.value.split())
        for field, doc in itertools.pairwise(tree.body)
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr)
    }
