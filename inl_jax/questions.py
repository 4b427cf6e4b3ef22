"""Asks the four questions of the published guide, and trains.

python3 train_inl_llm_large.py
python3 train_inl_llm_large.py --size 3b --data corpus.txt --epochs 10 --batch_size 4

What no flag answers is asked on the terminal. The answers become an `inl train` command, which is
shown and run. Each field of a config is a flag here, too, as in --data.column body.
"""

import math
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from inl_jax.cli import train
from inl_jax.cli.main import config_lines, exit_with
from inl_jax.config import InputError, TrainConfig
from inl_jax.config_file import as_overrides, load_config, override, presets
from inl_jax.console import say
from inl_jax.other_names import check_names
from inl_jax.terminal import signals
from inl_jax.terminal.command_line import Parser, exit_on_input_error, with_underscores
from inl_jax.text.sources import find_entries

PROGRAM = "python3 train_inl_llm_large.py"
EXAMPLE = f"{PROGRAM} --size 3b --data corpus.txt --epochs 10 --batch_size 4"


class Question(NamedTuple):
    """One question, and the flag that answers it."""

    flag: str
    text: str
    default: str  # empty: an answer is needed
    read: Callable[[str, TrainConfig], Any]
    """The value of an answer; raises `InputError` that says what is wrong with it. The config has
    the fields that are given as flags."""

    def ask(self, given: TrainConfig) -> Any:
        """Asks on the terminal until the answer can be used."""
        prompt = f"{self.text} [{self.default}]: " if self.default else f"{self.text}: "
        while True:
            answer = read_line(prompt) or self.default
            try:
                return self.read(answer, given)
            except InputError as error:
                say(f"  {error}")


def read_line(prompt: str) -> str:
    """What is typed on the terminal.

    Raises:
      InputError: nothing more comes, as after Ctrl-D.
    """
    try:
        return input(prompt).strip()
    except (EOFError, OSError, UnicodeError):
        say("")
        raise InputError(f"the input has ended; write {EXAMPLE}") from None


def read_size(text: str, given: TrainConfig) -> str:
    """The name of a config that comes with the project."""
    if text not in presets():
        raise InputError(f"size {text}: choose one of {', '.join(presets())}")
    return text


def read_data(text: str, given: TrainConfig) -> str:
    """A source as in `data.paths`."""
    find_entries([text], given.data)
    return text


def read_number(name: str, kind: type[int] | type[float]) -> Callable[[str, TrainConfig], float]:
    """Reads a positive number."""

    def read(text: str, given: TrainConfig) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < math.inf:
            whole = "whole " if kind is int else ""
            raise InputError(f"{name} {text}: must be a positive {whole}number")
        return value

    return read


QUESTIONS = (
    Question("size", "Size", "small", read_size),
    Question("data", "Text file, folder or dataset", "", read_data),
    Question("epochs", "Epochs", "3", read_number("epochs", float)),
    Question("batch_size", "Batch size, in sequences", "8", read_number("batch_size", int)),
)


def main() -> NoReturn:
    """The script: asks or reads the flags, trains, and exits as `inl train` does."""
    exit_with(run, sys.argv[1:])


def run(argv: Sequence[str]) -> int:
    """The script with this command line; returns the exit code."""
    with exit_on_input_error():
        answers, fields, asked = read_answers(argv)
        words = plan(answers, fields, show=asked)
        say(f"the same run: {shlex.join(['inl', 'train', *words])}")
        if asked and read_line("Start? [Y/n]: ").lower() not in ("", "y", "yes", "o", "oui"):
            return 0
        return train.main(words)


def read_answers(argv: Sequence[str]) -> tuple[dict[str, Any], list[str], bool]:
    """The answers, the words that set fields of the config, and whether any was asked for."""
    parser = Parser("", __doc__)
    parser.prog = PROGRAM
    for question in QUESTIONS:
        parser.add_argument(f"--{question.flag}", help=question.text)
    parser.add_argument("--learning_rate", type=float, help="its peak; that of the size by default")
    parser.add_argument("--save_dir", help="run directory; runs/inl_SIZE by default")
    argv = with_underscores(argv)
    check_names(argv, own=parser._option_string_actions)
    flags, fields = parser.parse_known_args(argv)
    answers = vars(flags)
    given = load_config(flags.size if flags.size in presets() else "small", fields)
    missing = [question for question in QUESTIONS if answers[question.flag] is None]
    if missing and not (sys.stdin and sys.stdin.isatty()):
        names = ", ".join(f"--{question.flag}" for question in missing)
        raise InputError(f"{names}: not given, and no terminal to ask on; write {EXAMPLE}")
    for question in QUESTIONS:
        if question not in missing:
            answers[question.flag] = question.read(answers[question.flag], given)
    if answers["size"] is None:
        say("\n".join(config_lines()))
    for question in missing:
        answers[question.flag] = question.ask(given)
    return answers, fields, bool(missing)


def plan(answers: dict[str, Any], fields: Sequence[str], *, show: bool) -> list[str]:
    """Prepares the data; returns the words of the `inl train` command.

    Args:
      answers: from `read_answers`.
      fields: from there, too.
      show: print the checklist and the time.

    Raises:
      InputError: as `train_inl_llm`; or, with `show`, a check has failed.
    """
    # Imported late: the questions are asked before JAX starts.
    from inl_jax.data.corpus import prepare
    from inl_jax.guide import guide_config, time_needed, with_warmup

    signals.unwind(patience=None)
    size, rate = answers["size"], answers["learning_rate"]
    base = load_config(size)
    config = guide_config(
        data_path=answers["data"],
        model_size=size,
        num_epochs=answers["epochs"],
        batch_size=answers["batch_size"],
        learning_rate=base.optim.learning_rate if rate is None else rate,
        max_samples=None,
        save_dir=answers["save_dir"] or f"runs/inl_{size}",
    )
    config = override(config, fields)
    if show:
        show_checklist(config, skip_data=True)  # before hours of work on the data
    corpus = prepare(config.data)
    config = with_warmup(config, corpus)
    if show:
        show_checklist(config)
        say(time_needed(config, corpus))
    return ["--config", size, *as_overrides(base, config)]


def show_checklist(config: TrainConfig, *, skip_data: bool = False) -> None:
    """Prints the checklist if it is complete or says why the run cannot start.

    Raises:
      InputError: a check has failed.
    """
    from inl_jax.checklist import as_table, checklist

    checks = checklist(config, skip_data=skip_data)
    failed = [check.name for check in checks if check.verdict == "failed"]
    if failed or not skip_data:
        say(as_table(checks))
    if failed:
        raise InputError(f"checklist: {', '.join(failed)} failed; the table says what is wanted")
