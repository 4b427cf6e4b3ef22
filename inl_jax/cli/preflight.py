"""Checks machine, data and config before a run, and prints a table of what it found.

inl preflight --config 3b --data.paths 'corpus/*.parquet' [--compile] [--skip_data] [--json]

The same flags as `inl train`, under the same launcher. Text that is not prepared yet is tokenised
into the cache, as `inl train` does; --skip_data leaves this out. The run directory is not touched.
Exit code 2: a check failed; warnings do not count.
"""

from collections.abc import Sequence

from inl_jax import console
from inl_jax.cli.train import FIRST
from inl_jax.config import InputError
from inl_jax.failures import EXIT_FAILED, EXIT_MISTAKE, MachineFailure
from inl_jax.files import json_text
from inl_jax.terminal import signals
from inl_jax.terminal.command_line import (
    Parser,
    add_launch_flags,
    from_command_line,
    join_processes,
    lines_on_stderr,
)


def main(argv: Sequence[str]) -> int:
    """The verb; returns the exit code, the same on every process."""
    parser = Parser("preflight", __doc__, add_help=False)
    parser.add_argument("--compile", action="store_true", help="compile the training step too")
    parser.add_argument("--skip_data", action="store_true", help="do not read the text")
    parser.add_argument("--json", action="store_true", help="print a JSON list of checks instead")
    add_launch_flags(parser)
    config, flags = from_command_line(parser, argv, first=FIRST)
    from inl_jax.parallel import processes

    signals.unwind()
    try:
        with lines_on_stderr():
            checks = run(config, flags)
        if processes.first():
            show(checks, flags)
        failed = any(check.verdict == "failed" for check in checks)
        return processes.end(EXIT_MISTAKE if failed else 0)
    except (InputError, MachineFailure) as error:
        return processes.end(error.exit_code, f"error: {error}")
    except processes.PeersMissing as error:
        return processes.end(EXIT_FAILED, f"error: {error}")


def run(config, flags):
    """The checks."""
    from inl_jax.checklist import checklist
    from inl_jax.planning.programs.xla import apply_flags, use_compile_cache

    join_processes(flags)
    apply_flags(config.xla_flags)
    if flags.compile:
        use_compile_cache()
    return checklist(config, skip_data=flags.skip_data, compiled=flags.compile)


def show(checks, flags) -> None:
    """Prints the checks, as a table or as JSON."""
    from inl_jax.checklist import as_table

    if flags.json:
        console.show(json_text([check._asdict() for check in checks]))
    else:
        console.show(as_table(checks))
