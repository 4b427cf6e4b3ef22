"""`inl evaluate --tasks`: its flags, and what it does with them."""

import argparse
import json
from typing import Any

from inl_jax.config import InputError
from inl_jax.console import reason, show
from inl_jax.failures import MachineFailure
from inl_jax.files import json_text, write_text
from inl_jax.terminal.command_line import Parser

# Flags that go with --tasks alone, and flags of the text that tasks do not read.
_OF_TASKS = (
    *("num_fewshot", "limit", "gen_kwargs", "include_path", "metadata", "output"),
    "confirm_run_unsafe_code",
)
_OF_TEXT = ("data", "column", "seq_len", "data.hf_split", "data.bad_utf8", "data.cache_dir")


def add_task_flags(parser: Parser) -> None:
    """Adds `--tasks` and what goes with it; the names are those of lm_eval."""
    add = parser.add_argument
    add("--tasks", nargs="+", help="tasks of lm-evaluation-harness: names, patterns, YAML files")
    add("--num_fewshot", type=int, help="examples before each question; the task's by default")
    add("--limit", type=float, help="questions of each task, or a fraction below 1; else all")
    add("--gen_kwargs", help="settings of generation, as max_gen_toks=64,top_k=40")
    parser.add_path("--include_path", metavar="DIR", help="a folder with more tasks")
    add("--metadata", type=_json_object, help="JSON for tasks that make their own data")
    parser.add_path("--output", metavar="FILE", help="write the results of the tasks as JSON")
    add(
        "--confirm_run_unsafe_code",
        action="store_true",
        help="allow tasks that run the code which the model writes",
    )


def are_tasks_named(flags: argparse.Namespace) -> bool:
    """Whether there are tasks to run.

    Raises:
      InputError: a flag does not go with what is run, or has an impossible value.
    """
    for name in _OF_TEXT if flags.tasks else _OF_TASKS:
        if getattr(flags, name) not in (None, False):
            what = "is not for --tasks; leave it out" if flags.tasks else "is of --tasks; give both"
            raise InputError(f"--{name} {getattr(flags, name)}: {what}")
    if flags.num_fewshot is not None and flags.num_fewshot < 0:
        raise InputError(f"--num_fewshot {flags.num_fewshot}: must be 0 or more")
    limit = flags.limit
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and limit.is_integer())):
        raise InputError(f"--limit {limit:g}: must be a whole number, or between 0 and 1")
    if flags.output and not flags.output.parent.is_dir():
        raise InputError(f"--output {flags.output}: there is no folder {flags.output.parent}")
    if flags.output and flags.output.is_dir():
        raise InputError(f"--output {flags.output}: is a folder; name a file")
    if flags.include_path and not flags.include_path.is_dir():
        raise InputError(f"--include_path {flags.include_path}: there is no such folder")
    for setting in (flags.gen_kwargs or "").split(","):
        if flags.gen_kwargs is not None and "=" not in setting:
            raise InputError(f"--gen_kwargs {setting}: must be NAME=VALUE")
    if flags.tasks and not _names(flags):
        raise InputError("--tasks: names no task")
    return bool(flags.tasks)


def _names(flags: argparse.Namespace) -> list[str]:
    return [name for word in flags.tasks for name in word.split(",") if name]


def tasks_from(flags: argparse.Namespace) -> dict[str, Any]:
    """The tasks that the flags name, with their data, for `evaluate_tasks`."""
    from inl_jax.harness.tasks import load_tasks

    return load_tasks(
        flags.checkpoint,
        _names(flags),
        num_fewshot=flags.num_fewshot,
        gen_kwargs=flags.gen_kwargs,
        include_path=flags.include_path,
        metadata=flags.metadata,
        run_unsafe_code=flags.confirm_run_unsafe_code,
    )


def show_results(flags: argparse.Namespace, results: dict[str, Any]) -> None:
    """Shows the results of `evaluate_tasks`, as a table or as JSON, and writes `--output`.

    Raises:
      MachineFailure: the file cannot be written. The results are shown before.
    """
    from inl_jax.harness.tasks import table

    results = {"checkpoint": str(flags.checkpoint), "step": flags.step} | results
    show(json_text(results) if flags.json else table(results))
    if flags.output:
        try:
            write_text(flags.output, json_text(results, indent=2) + "\n")
        except OSError as error:
            raise MachineFailure(f"{flags.output} cannot be written ({reason(error)})") from None


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'{text}: must be a JSON object, as {{"key": 1}}')
    return found
