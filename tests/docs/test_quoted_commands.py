"""Commands quoted in the project's pages: their verbs, flags and files exist."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from inl_jax.cli.main import SPELLINGS, VERBS
from inl_jax.config import field_types
from inl_jax.terminal.command_line import Parser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES.remove(ROOT / "docs" / "LOG.md")  # what was true on its day
FENCED = re.compile(r"^( *)(```+)[^\n]*\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
# Flags of other programs (sbatch, tensorboard, docker, sky, benchmarks), and one that
# stands for all of ours.
OF_OTHERS = {
    *("--signal", "--time", "--logdir", "--build-arg", "--restart", "--num-nodes"),
    *("--tokens_per_second", "--section.field", "--only", "--list", "--dry_run"),
}
# A verb, under each of its names, and the words up to the next command.
COMMAND = re.compile(
    r"(?:^|(?<=[\s(\[]))(?:(?:inl|python3? -m inl_jax) |python3? scripts/(?=\w+\.py))"
    r"(?P<verb>[a-z]\w*)(?:\.py)?(?P<rest>(?:\s[^\n;&]*)?)",
    re.MULTILINE,
)


class Parsed(Exception):
    """Carries the parser of a verb out of it, in place of the flags it would read."""


@pytest.fixture(scope="module")
def flags_of():
    """The flags of each verb; with `--config`, each field of a config is one, too."""

    def stop(parser, *_):
        raise Parsed(parser)

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "parse_known_args", stop)
        for verb in VERBS:
            module = "import_" if verb == "import" else verb
            with pytest.raises(Parsed) as parsed:
                importlib.import_module(f"inl_jax.cli.{module}").main([])
            (parser,) = parsed.value.args
            found[verb] = {*parser._option_string_actions, "--help"}
            if "--config" in found[verb]:
                found[verb] |= {f"--{field}" for field in field_types()}
    return found


def code(page: str) -> tuple[list[str], list[str]]:
    """The blocks of code of a page, with continued lines joined, and its code within lines."""
    blocks = [block[3].replace("\\\n", " ") for block in FENCED.finditer(page)]
    return blocks, [" ".join(one.split()) for one in INLINE.findall(FENCED.sub("", page))]


def words_of(text: str) -> list[str]:
    """The words of a command; brackets around what may be left out are dropped."""
    try:
        words = shlex.split(text, comments=True)
    except ValueError:  # an apostrophe in a synopsis
        words = text.split()
    return [word.strip("[](),") for word in words]


def mistakes(command: re.Match, flags_of) -> list[str]:
    verb = SPELLINGS.get(command["verb"].replace("-", "_"), command["verb"])
    if verb not in VERBS:
        return [f"inl {verb}"]
    names = [word.partition("=")[0] for word in words_of(command["rest"]) if word[:2] == "--"]
    unknown = {name.replace("-", "_").replace("__", "--", 1) for name in names} - flags_of[verb]
    return [f"inl {verb} {name}" for name in sorted(unknown)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_each_page_have_verbs_and_flags_that_exist(page, flags_of):
    blocks, inline = code(page.read_text())
    commands = [match for block in blocks for match in COMMAND.finditer(block)]
    commands += [match for one in inline if (match := COMMAND.match(one))]
    assert not [mistake for command in commands for mistake in mistakes(command, flags_of)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_flags_that_a_page_names_alone_are_those_of_a_verb(page, flags_of):
    known = set().union(*flags_of.values()) | OF_OTHERS
    _, inline = code(page.read_text())
    named = {re.split("[ =]", one)[0] for one in inline if one.startswith("--")}
    assert not [name for name in named if not any(flag.startswith(name) for flag in known)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_scripts_and_tests_that_a_page_names_exist(page):
    text = "\n".join(sum(code(page.read_text()), []))
    named = re.findall(
        r"(?<![\w/.])((?:benchmarks|scripts|tests|configs|inl_jax)/[\w/]+\.py)", text
    )
    named += re.findall(r"pytest (?:-m slow )?(tests/[\w/]+)", text)
    assert not [name for name in named if "VERB" not in name and not (ROOT / name).exists()]


def test_stale_commands_are_found(flags_of):
    for line, found in {
        "inl train --config 3b --data.paths x --run-dir y": [],
        "inl evaluate RUN [--step best] | head": [],
        "CUDA=0 inl trane": ["inl trane"],
        "inl evaluate RUN --run_dir x": ["inl evaluate --run_dir"],
        "python scripts/train.py --lr=1": ["inl train --lr"],
        "x && inl plot RUN && ls --all": [],
    }.items():
        (command,) = COMMAND.finditer(line)
        assert mistakes(command, flags_of) == found, line
