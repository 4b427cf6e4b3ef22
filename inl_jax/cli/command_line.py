"""Flags of a verb beside those of the config."""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence

from inl_jax.config import InputError, TrainConfig
from inl_jax.config_file import load_config


@contextlib.contextmanager
def exit_on_input_error() -> Iterator[None]:
    """For scripts: an `InputError` becomes one line on stderr and exit code 2."""
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def from_command_line(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> tuple[TrainConfig, argparse.Namespace]:
    """The config that `--config FILE --section.field value ...` names, and the script's own flags.

    Args:
      parser: made with `add_help=False`, holding the flags of the script itself.
      argv: the command line; the process's own by default.
    """
    parser.add_argument("--config", required=True, help="config file, or a name such as tiny")
    parser.add_argument("-h", "--help", action="store_true", help="show this and every field")
    argv = list(sys.argv[1:] if argv is None else argv)
    asked_for_help = "-h" in argv or "--help" in argv
    if asked_for_help:
        parser.print_help()
        print("\nevery other flag overrides a field of the config:")
        with_file = "--config" in argv or any(arg.startswith("--config=") for arg in argv)
        argv = argv if with_file else ["--config", "tiny", *argv]
    flags, overrides = parser.parse_known_args(argv)
    with exit_on_input_error():
        return load_config(
            flags.config, [*overrides, "--help"] if asked_for_help else overrides
        ), flags
