"""How the XLA compiler is set up, before JAX starts: its flags, and the cache of what it made."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from jax._src.xla_bridge import backends_are_initialized  # has no public name

from inl_jax.config import InputError

CACHE_DIR = "~/.cache/inl_jax/xla"


def use_compile_cache(*, report=print) -> None:
    """Keeps compiled programs on disk for the next start of this or another process; says where.

    JAX's own settings stand where they were made: JAX_COMPILATION_CACHE_DIR chooses the directory,
    JAX_ENABLE_COMPILATION_CACHE=0 turns the cache off. For scripts, and for programs that want it:
    the setting holds for the whole process, so nothing in the library makes it unasked.
    """
    if jax.config.jax_compilation_cache_dir is None:
        try:
            directory = Path(CACHE_DIR).expanduser()
            directory.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError) as error:  # no home, or not ours to write to
            report(f"compiled programs are not kept: {error}")
            return
        jax.config.update("jax_compilation_cache_dir", str(directory))
    if jax.config.jax_compilation_cache_dir and jax.config.jax_enable_compilation_cache:
        report(f"compiled programs are kept in {jax.config.jax_compilation_cache_dir}")
    else:
        report("compiled programs are not kept: JAX's compilation cache is turned off")


def apply_flags(flags: Sequence[str], *, report=print) -> None:
    """Adds to XLA_FLAGS those of `flags` that this installation knows; says which, and drops which.

    XLA ends the process at a flag it does not know, and its flags change from version to version.
    So another process tries them first.

    Args:
      flags: as `TrainConfig.xla_flags`.
      report: where the lines go.

    Raises:
      InputError: JAX has started already, too late for flags, or does not start without them.
    """
    flags = " ".join(flags).split()
    if not flags:
        return
    if backends_are_initialized():
        raise InputError(
            f"xla_flags={' '.join(flags)}: JAX has started already; apply them before its first use"
        )
    known = _accepted(flags)
    for flag in flags:
        if flag not in known:
            report(f"WARNING: XLA here does not take {flag}; it is left out (xla_flags)")
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *known]).strip()
    report(f"XLA_FLAGS={os.environ['XLA_FLAGS']}")


def _accepted(flags: list[str]) -> list[str]:
    if _starts_with(flags):
        return flags
    if not _starts_with([]):
        raise InputError(
            f"XLA_FLAGS={os.environ.get('XLA_FLAGS', '')}: JAX does not start with it; try "
            "python -c 'import jax; jax.devices()'"
        )
    known = []
    for flag in flags:
        if _starts_with([*known, flag]):
            known.append(flag)
    return known


def _starts_with(flags: list[str]) -> bool:
    """Whether a process of its own starts JAX, on the devices of this one, with these flags."""
    env = os.environ | {
        "XLA_FLAGS": " ".join([os.environ.get("XLA_FLAGS", ""), *flags]),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    trial = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.run(trial, env=env, capture_output=True).returncode == 0
