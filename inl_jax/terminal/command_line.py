"""Command lines: a parser whose mistakes are one line, and the config that a line names."""

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

from inl_jax import console
from inl_jax.checks import require
from inl_jax.config import InputError, MeshConfig, ModelConfig, TrainConfig
from inl_jax.config_file import load_config, presets
from inl_jax.config_help import HELP, help_text
from inl_jax.failures import MachineFailure
from inl_jax.files import user_path
from inl_jax.other_names import check_names, closest


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it is written, and the default of every flag that has one."""

    def _get_help_string(self, action):
        useless = action.default is False or action.default in (None, "", [])
        useless = useless or "default" in action.help
        return action.help if useless else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Flags in full, with underscores or dashes; a mistake raises `InputError`."""

    def __init__(self, verb: str, doc: str | None, **settings):
        super().__init__(
            prog=f"inl {verb}",
            description=doc,
            allow_abbrev=False,  # --num would be --num_processes
            formatter_class=_Help,
            **settings,
        )
        self._paths: list[argparse.Action] = []

    def error(self, message: str) -> NoReturn:
        """Instead of the usage and exit."""
        raise InputError(message)

    def print_help(self, file=None) -> None:
        """Shows the help as a result, which a lost reader or a full disk may meet."""
        console.show(self.format_help().rstrip("\n"))

    def add_path(self, name: str, **settings) -> None:
        """Adds a flag whose value is a path, or several."""
        self._paths.append(self.add_argument(name, **settings))

    def add_run(self) -> None:
        """Adds `--checkpoint RUN`, which `parse_flags` also finds as `RUN` alone."""
        self.add_path("--checkpoint", metavar="RUN", help="run directory; RUN alone means the same")

    def parse_known_args(self, args=None, namespace=None):
        """As argparse does, and with `Path`s for the flags of `add_path`."""
        flags, unknown = super().parse_known_args(args, namespace)
        for action in self._paths:
            name, given = (action.option_strings or [action.dest])[0], getattr(flags, action.dest)
            if isinstance(given, list):
                setattr(flags, action.dest, [user_path(one, name) for one in given])
            elif given is not None:
                setattr(flags, action.dest, user_path(given, name))
        return flags, unknown

    def parse_flags(self, argv: Sequence[str]) -> argparse.Namespace:
        """The values of the flags.

        Raises:
          InputError: one flag is unknown or missing, or its value is not of its type.
        """
        flags, unknown = self.parse_known_args(with_underscores(argv))
        if getattr(flags, "checkpoint", "") is None:
            if not unknown or unknown[0].startswith("-"):
                raise InputError(f"name a run directory: {self.prog} RUN")
            flags.checkpoint = user_path(unknown.pop(0), "RUN")
        if unknown:
            name = unknown[0].partition("=")[0]
            raise InputError(f"{name}: no such flag{closest(name, self._option_string_actions)}")
        return flags


def with_underscores(argv: Sequence[str]) -> list[str]:
    """The same command line with `--run-dir` written as `--run_dir`; values stay as they are."""

    def spell(word: str) -> str:
        name, equals, value = word.partition("=")
        return f"--{name[2:].replace('-', '_')}{equals}{value}" if name[:2] == "--" else word

    return [spell(word) for word in argv]


def from_command_line(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
    *,
    first: Sequence[str] = (),
) -> tuple[TrainConfig, argparse.Namespace]:
    """The config of `--config FILE --section.field value ...`, and the verb's own flags.

    Args:
      parser: made with `add_help=False`; holds the flags of the verb itself.
      argv: the command line; the process's own by default.
      first: dotted names of the fields that `--help` shows first.

    Raises:
      InputError: a flag, a field or a value is wrong.
      SystemExit: after `--help`.
    """
    parser.add_argument(
        "--config", metavar="NAME", help="a config file, or a name that `inl` lists, such as tiny"
    )
    parser.add_argument("-h", "--help", nargs="?", const="short", choices=HELP)
    argv = with_underscores(sys.argv[1:] if argv is None else argv)
    check_names(argv, own=parser._option_string_actions)
    flags, overrides = parser.parse_known_args(argv)
    if flags.help:
        config = load_config(flags.config or "tiny", overrides)
        console.show(help_text(parser, config, first, about=flags.help))
        raise SystemExit
    if flags.config is None:
        named = next((word for word in overrides if word in presets() or word[-3:] == ".py"), None)
        if named:
            raise InputError(f"{named}: write --config {named}")
        raise InputError(f"--config is missing: name a file, or one of {', '.join(presets())}")
    return load_config(flags.config, overrides), flags


def add_mesh_flags(parser: argparse.ArgumentParser) -> None:
    """Adds `--mesh.data`, `--mesh.fsdp` and `--mesh.tensor`, for `mesh_from`."""
    for axis, what in (
        ("data", "devices that each take other rows"),
        ("fsdp", "devices that share the parameters and also split the rows"),
        ("tensor", "devices that split each layer"),
    ):
        parser.add_argument(f"--mesh.{axis}", type=_axis, metavar="N", help=f"{what}, or rest")


def add_launch_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of one process among several, for `join_processes`."""
    parser.add_argument("--coordinator", default="", help="host:port of process 0 of several")
    parser.add_argument("--num_processes", type=int, help="how many; 1 ignores any launcher")
    parser.add_argument("--process_id", type=int, help="which of them this is, from 0")
    parser.add_argument(
        "--start_timeout", type=int, default=300, help="seconds for all processes to start"
    )
    parser.add_argument(
        "--peer_timeout",
        type=int,
        default=60,
        help="seconds without a sign of life after which a process counts as dead and all end",
    )


def join_processes(flags: argparse.Namespace) -> None:
    """Joins the other processes that the flags or a launcher name. Call it before JAX starts.

    Raises:
      InputError: a flag or a variable of the launcher is missing or impossible.
      PeersMissing: not all processes joined in time.
    """
    from inl_jax.parallel import processes
    from inl_jax.parallel.launch import find_launch

    launch = find_launch(
        os.environ,
        coordinator=flags.coordinator,
        num_processes=flags.num_processes,
        process_id=flags.process_id,
    )
    processes.start(launch, start_timeout=flags.start_timeout, peer_timeout=flags.peer_timeout)


def mesh_from(flags: argparse.Namespace):
    """The mesh that the flags name; None, which is a single device, if they name none.

    Raises:
      InputError: the devices are not as many.
    """
    given = {key.removeprefix("mesh."): n for key, n in vars(flags).items() if key[:5] == "mesh."}
    given = {axis: n for axis, n in given.items() if n is not None}
    if not given:
        return None
    from inl_jax.parallel.sharding import make_mesh

    return make_mesh(MeshConfig(**given))


def add_depth_flags(parser: argparse.ArgumentParser) -> None:
    """Adds `--iterations` and `--tol`, for `at_depth`."""
    parser.add_argument(
        "--iterations",
        type=int,
        metavar="N",
        help="integrator steps per block, fewer or more than trained; as trained by default",
    )
    parser.add_argument(
        "--tol",
        type=float,
        metavar="X",
        help="a token takes no more steps in a block after one whose rms(x' - x) is below X",
    )


def at_depth(model: ModelConfig, flags: argparse.Namespace) -> ModelConfig:
    """The model with the depth that the flags name; its weights fit any.

    Raises:
      InputError: the model has no integrator, or cannot be computed so.
    """
    given = {"num_iterations": flags.iterations, "tol": flags.tol}
    given = {field: value for field, value in given.items() if value is not None}
    for field, value in given.items():
        require(
            model.num_iterations > 0,
            f"--{field.removeprefix('num_')} {value}: the model has no integrator "
            "(model.num_iterations=0); leave it out",
        )
    least = 1 if model.context == "mean" else 0
    require(
        given.get("num_iterations", least) >= least,
        f"--iterations {flags.iterations}: must be at least {least} with "
        f"model.context={model.context}",
    )
    return dataclasses.replace(model, **given)


def _axis(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


@contextlib.contextmanager
def lines_on_stderr() -> Iterator[None]:
    """Keeps the lines of `say` apart from the result on stdout."""
    console.speak_to(sys.stderr)
    try:
        yield
    finally:
        console.speak_to(None)


@contextlib.contextmanager
def exit_on_input_error() -> Iterator[None]:
    """For programs beside `inl`: a mistake or failure is one line on stderr and its exit code."""
    try:
        yield
    except (InputError, MachineFailure) as error:
        console.complain(f"error: {error}")
        raise SystemExit(error.exit_code) from None
