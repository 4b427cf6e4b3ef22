"""The XLA compiler: its flags, the cache of what it made, and compiling for GPUs without one."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src.xla_bridge import backends_are_initialized  # has no public name
from jax.experimental import topologies
from jax.sharding import Mesh
from jaxlib import xla_client

from inl_jax.config import InputError, TrainConfig
from inl_jax.parallel.sharding import on
from inl_jax.training.state import make_layout
from inl_jax.training.step import trace_step

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


# An H100 as XLA describes it: what its CUDA compiler must know where it cannot ask the device.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 patch: 0 } device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Program(NamedTuple):
    """What XLA made of a step."""

    memory: Any  # as `memory_analysis()` of a compiled function, for each device
    text: str  # the optimised HLO


def use_no_device(compiler: str) -> None:
    """Keeps JAX on the CPU, where of CUDA at most the compiler is wanted. Before JAX starts.

    Args:
      compiler: "cpu", or "cuda" for a process that will call `compile_for_cuda`.
    """
    os.environ |= {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    if compiler == "cpu":  # JAX has read JAX_PLATFORMS already
        jax.config.update("jax_platforms", "cpu")


def compile_abstractly(config: TrainConfig, mesh: Mesh, compiler: str) -> Program:
    """A training step compiled for the devices of `mesh`; nothing is allocated and nothing runs.

    Args:
      config: the run, fitted to `mesh`.
      mesh: of CPU devices.
      compiler: "cpu", or "cuda" for as many H100s.
    """
    with on(mesh):
        traced = trace_step(config, mesh, make_layout(config, mesh))
        if compiler == "cuda":
            return compile_for_cuda(traced, mesh.size)
        compiled = traced.lower().compile()
    return Program(compiled.memory_analysis(), compiled.as_text())


def compile_for_cuda(traced, num_devices: int) -> Program:
    """Compiles for H100s on a machine without any, by XLA's own CUDA compiler; nothing runs.

    GEMM kernels are not tried out, so speed cannot be told from it; buffers, collectives and memory
    spaces are what a GPU would get.

    Args:
      traced: from `jax.jit(...).trace` over a mesh of `num_devices` CPU devices.
      num_devices: how many.

    Raises:
      InputError: JAX's CUDA plugin is not installed, or was started without
        JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1, which keeps it from giving up where it finds no device.
    """
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=_H100, topology=f"1x1x{num_devices}"
        )
        devices = topology.devices
        options = xla_client.CompileOptions()
        options.num_replicas, options.num_partitions = 1, num_devices
        assignment = np.arange(num_devices).reshape(1, -1)
        options.device_assignment = xla_client.DeviceAssignment.create(assignment)
        build = options.executable_build_options
        build.num_replicas, build.num_partitions = 1, num_devices
        build.use_spmd_partitioning, build.use_shardy_partitioner = num_devices > 1, True
        options.env_option_overrides = [("xla_gpu_autotune_level", 0)]
        module = traced.lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")
        executable = devices[0].client.compile(
            module, xla_client.DeviceList(tuple(devices)), options
        )
    except (RuntimeError, NotImplementedError, AttributeError, TypeError) as error:
        raise InputError(
            f"XLA's CUDA compiler cannot be used without a device ({_first_line(error)}): install "
            "inl_jax[cuda] (its compiler needs no GPU) and start with "
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1, or compile for the CPU"
        ) from error
    text = "\n".join(module.to_string() for module in executable.hlo_modules())
    return Program(executable.get_compiled_memory_stats(), text)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
