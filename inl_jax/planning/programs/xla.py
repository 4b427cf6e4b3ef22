"""The XLA compiler: its flags, the cache of its programs, and compiling a step without a device."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from inl_jax.config import InputError, TrainConfig
from inl_jax.console import first_line, say
from inl_jax.internals import backends_are_initialized, compile_for_topology, cudnn_assumed
from inl_jax.model.platform.device import H100, made_for
from inl_jax.parallel import sharding
from inl_jax.planning.hardware import XLA_H100, XLA_H100_CUDNN
from inl_jax.training.state import Layout
from inl_jax.training.step import trace_step

CACHE_DIR = "~/.cache/inl_jax/xla"
KEPT_FROM = 0.1
"""Seconds from which on a program is kept that took so long to compile."""


def use_compile_cache() -> None:
    """Keeps compiled programs on disk for later processes, and says in which directory.

    The user's settings of JAX have priority: JAX_COMPILATION_CACHE_DIR names another directory, and
    JAX_ENABLE_COMPILATION_CACHE=0 turns the cache off. The setting holds for the whole process, so
    the commands call this; the library never does so unasked.
    """
    if jax.config.jax_compilation_cache_dir is None:
        try:
            directory = Path(CACHE_DIR).expanduser()
            directory.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError) as error:  # there is no home, or it is read-only
            say(f"compiled programs are not kept: {error}")
            return
        jax.config.update("jax_compilation_cache_dir", str(directory))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # JAX keeps what took a second, and thus not the small programs of a start.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", KEPT_FROM)
    if jax.config.jax_compilation_cache_dir and jax.config.jax_enable_compilation_cache:
        say(f"compiled programs are kept in {jax.config.jax_compilation_cache_dir}")
    else:
        say("compiled programs are not kept: JAX's compilation cache is turned off")


def apply_flags(flags: Sequence[str]) -> None:
    """Adds to XLA_FLAGS those flags that this XLA knows, and says which it adds and which it drops.

    XLA aborts the process at an unknown flag, and flags change from version to version. Another
    process tries them first.

    Args:
      flags: as `TrainConfig.xla_flags`.

    Raises:
      InputError: JAX has already started its devices, after which XLA ignores flags, or JAX does
        not start even without these flags.
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
            say(f"WARNING: XLA here does not take {flag}; it is left out (xla_flags)")
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *known]).strip()
    say(f"XLA_FLAGS={os.environ['XLA_FLAGS']}")


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
    """Whether JAX starts with these flags in another process, on the devices of this one."""
    env = os.environ | {
        "XLA_FLAGS": " ".join([os.environ.get("XLA_FLAGS", ""), *flags]),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    trial = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.run(trial, env=env, capture_output=True).returncode == 0


class Program(NamedTuple):
    """A compiled step, to read and not to run."""

    memory: Any  # for each device, as `memory_analysis()` of a compiled function
    text: str  # the optimised HLO


def use_no_device(compiler: str) -> None:
    """Keeps this process off GPUs. Call it before JAX starts.

    Args:
      compiler: "cpu", or "cuda" for a process that will compile for GPUs.
    """
    os.environ |= {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    if compiler == "cpu":  # too late for the variable JAX_PLATFORMS: importing JAX has read it
        jax.config.update("jax_platforms", "cpu")


def compile_abstractly(config: TrainConfig, mesh: Mesh, layout: Layout, compiler: str) -> Program:
    """Compiles a run's training step. Nothing is allocated and nothing runs.

    Args:
      config: the run, fitted to `mesh`.
      mesh: of CPU devices, which stand for the devices to compile for.
      layout: from `make_layout`.
      compiler: "cpu", or "cuda" for as many H100s.

    Raises:
      InputError: as `compile_for_cuda`.
    """
    if compiler == "cuda":
        with sharding.on(mesh), made_for(H100), cudnn_assumed(XLA_H100_CUDNN, H100.capability):
            return compile_for_cuda(trace_step(config, mesh, layout), mesh.size)
    with sharding.on(mesh):
        compiled = trace_step(config, mesh, layout).lower().compile()
    return Program(compiled.memory_analysis(), compiled.as_text())


def compile_for_cuda(traced: Any, num_devices: int) -> Program:
    """Compiles for H100s with XLA's CUDA compiler, which needs no GPU.

    Buffers, collectives and memory spaces are those that a GPU would get. Speed is not: XLA chooses
    GEMM kernels by timing them, and here it cannot.

    Args:
      traced: from `jax.jit(...).trace` over a mesh of `num_devices` CPU devices.
      num_devices: size of that mesh.

    Raises:
      InputError: JAX's CUDA plugin is missing, or it gave up because it found no device and
        JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 was not set when it started.
    """
    try:
        executable = compile_for_topology(
            traced,
            platform="cuda",
            topology=f"1x1x{num_devices}",
            target_config=XLA_H100,
            num_devices=num_devices,
            options={"xla_gpu_autotune_level": 0},
        )
    except (RuntimeError, NotImplementedError, AttributeError, TypeError) as error:
        raise InputError(
            f"XLA's CUDA compiler cannot be used without a device ({first_line(error)[:200]}): "
            "install inl_jax[cuda] (its compiler needs no GPU) and start with "
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1, or compile for the CPU"
        ) from error
    text = "\n".join(module.to_string() for module in executable.hlo_modules())
    return Program(executable.get_compiled_memory_stats(), text)
