"""Writes a page about one run, or several compared: inl report RUN [RUN ...] [--out report.html].

The page is one file that needs no network: charts, samples, config, environment, what was reached
and what it cost. Its size is about 5 MB, nearly all of it the library that draws.
"""

from collections.abc import Sequence
from pathlib import Path

from inl_jax.config import InputError
from inl_jax.console import reason, say
from inl_jax.files import write_text
from inl_jax.terminal import signals
from inl_jax.terminal.command_line import Parser


def main(argv: Sequence[str]) -> int:
    """The verb; returns the exit code."""
    parser = Parser("report", __doc__)
    parser.add_path("run_dirs", nargs="+", metavar="RUN", help="run directories")
    parser.add_path("--out", help="the page; by default RUN/report.html, or report.html")
    flags = parser.parse_flags(argv)
    here = flags.run_dirs[0] if len(flags.run_dirs) == 1 else Path(".")
    out = flags.out or here / "report.html"
    if out.is_dir() or out.suffix not in (".html", ".htm"):
        raise InputError(f"--out {out}: is no page; name one, such as report.html")
    # Imported late: a mistake on the command line is answered at once.
    from inl_jax.report.run import read_runs
    from inl_jax.report.run_report import report

    signals.unwind()
    text = report(read_runs(flags.run_dirs))
    try:
        write_text(out, text)
    except OSError as error:
        raise InputError(f"--out {out}: {reason(error)}; name another file") from None
    say(f"report: {out}")
    return 0
