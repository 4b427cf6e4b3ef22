"""The `inl` command: finds the verb, runs it, and ends with its exit code.

Exit codes of every verb: 0 done; 1 failed; 2 a mistake in the input; 12 out of memory; 28 the disk
is full; 75 ended by SIGTERM; 130 ended by Ctrl-C. After 75 and 130 the same command may be run
again. `inl train` and `inl estimate` say more of theirs. A reader of the output that goes away, as
`| head` does, changes no exit code. If what a verb prints is its result, as in `inl generate`, and
cannot be written, the code is 1.
"""

import importlib
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from inl_jax import __version__
from inl_jax.console import complain, first_line, flush, show
from inl_jax.failures import EXIT_MISTAKE, MachineFailure, OutOfMemory, is_out_of_memory
from inl_jax.terminal import signals
from inl_jax.training.stop import Stopped

VERBS = {
    "train": "trains a model, or resumes its run",
    "prepare": "turns text into cached tokens, before training does",
    "preflight": "checks machine, data and config before a run",
    "evaluate": "computes loss and bits per byte of a run, or runs tasks on it",
    "generate": "continues prompts with a trained model",
    "estimate": "predicts memory, time and price of a run, without a device",
    "verify": "checks that a run directory holds what was saved in it",
    "plot": "draws the loss of a run",
    "report": "writes a page about a run, or several compared",
    "inspect": "draws what the integrator does with a text",
    "import": "makes a run directory from an exported model or published weights",
    "export": "writes a model for Hugging Face transformers",
}
SPELLINGS = {"prepare_data": "prepare", "import_torch": "import", "inspect_run": "inspect"}


def main(*words: str) -> NoReturn:
    """Runs `words` (a door in scripts/ names its verb) and the command line, and exits."""
    exit_with(run, [*words, *sys.argv[1:]])


def exit_with(program: Callable[[Sequence[str]], int], argv: Sequence[str]) -> NoReturn:
    """Runs a program with its command line, and exits with its code, or with that of a signal."""
    signals.end_at_once()  # before anything heavy is imported
    try:
        try:
            code = program(argv)
        except SystemExit as stop:  # after --help
            code = stop.code
        flush()
    except KeyboardInterrupt as stopped:
        signals.leave(signal.SIGTERM if isinstance(stopped, Stopped) else signal.SIGINT)
    signals.ignore()
    sys.exit(code)


def run(argv: Sequence[str]) -> int:
    """`inl` with this command line, in this process; returns the exit code."""
    # Imported late, as all that is not needed to catch a signal.
    from inl_jax.config import InputError

    word, *rest = argv or ("--help",)
    verb = word.replace("-", "_")
    verb = SPELLINGS.get(verb, verb)
    try:
        if word in ("-h", "--help", "help") or (verb == "train" and not rest):
            show(overview())
            return 0 if argv and verb != "train" else EXIT_MISTAKE
        if word == "--version":
            show(f"inl_jax {__version__}")
            return 0
        if word.startswith("-"):
            raise InputError(f"name a verb first, such as inl train {shlex.join(argv)}")
        if verb not in VERBS:
            raise InputError(f"inl {word}: no such verb; the closest is inl {_closest(verb)}")
        module = importlib.import_module(f"inl_jax.cli.{'import_' if verb == 'import' else verb}")
        return module.main(rest)
    except (InputError, MachineFailure) as error:
        complain(f"error: {error}")
        return error.exit_code
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        complain(f"error: out of memory: {first_line(error)}")
        return OutOfMemory.exit_code


def overview() -> str:
    """The verbs, the configs that come with the project, and a command to start with."""
    lines = [
        "usage: inl VERB [--flag value ...]; inl VERB --help lists the flags",
        "",
        *(f"  inl {verb:10} {what}" for verb, what in VERBS.items()),
        "",
        "configs (--config NAME), their parameters, and the estimated memory of one GPU to train:",
        "",
        *config_lines(),
        "",
        "a first run, on the standard library of this Python, in minutes on two CPU cores:",
        "",
        "  inl train --config tiny",
    ]
    return "\n".join(lines)


def config_lines() -> list[str]:
    """The configs that come with the project, a line for each: name, parameters, memory."""
    from inl_jax.config_file import presets, read_lab_note

    notes = {name: read_lab_note(path) for name, path in presets().items()}
    rows = [
        (name, f"{note.num_params:,} parameters ({note.count})", note.memory)
        for name, note in sorted(notes.items(), key=lambda item: item[1].num_params)
    ]
    name_width, size_width = (max(len(row[i]) for row in rows) for i in range(2))
    return [f"  {name:{name_width}}  {size:>{size_width}}  {memory}" for name, size, memory in rows]


def _closest(verb: str) -> str:
    import difflib

    found = difflib.get_close_matches(verb, [*VERBS, *SPELLINGS], n=1, cutoff=0)[0]
    return SPELLINGS.get(found, found)
