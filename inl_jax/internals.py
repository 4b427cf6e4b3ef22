"""All uses of private or experimental names of JAX and Orbax: none has a public equivalent.

Each function says what is lost if its name disappears from a later version, and then degrades or
raises one clear line.
"""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from inl_jax.config import InputError


def distributed_state() -> Any:
    """Returns JAX's record of the processes: `process_id`, `num_processes` and `client`.

    `client` is their key-value store, or None before `jax.distributed.initialize`. The public
    `jax.process_index()` starts the devices, and no public name reaches the store.
    Without it several processes cannot agree on anything; one process alone does not need it.

    Raises:
      InputError: this JAX has no such record.
    """
    return _require("jax._src.distributed.global_state", or_else="train with one process")


def backends_are_initialized() -> bool:
    """Returns whether JAX has started its devices, without starting them.

    Without it the answer is always False, so XLA flags that come too late are not refused: XLA
    ignores them in silence.
    """
    ask = _find("jax._src.xla_bridge.backends_are_initialized")
    return ask is not None and ask()


def compile_for_topology(
    traced: Any,
    *,
    platform: str,
    topology: str,
    target_config: str,
    num_devices: int,
    options: dict[str, Any],
) -> Any:
    """Compiles a traced function for devices that this machine does not have.

    Without it nothing can be compiled for a GPU on a machine that has none; the CPU compiler still
    gives a first estimate.

    Args:
      traced: from `jax.jit(...).trace` over a mesh of `num_devices` devices of any kind.
      platform: XLA's name for the devices, for example "cuda".
      topology: slices x hosts of a slice x devices of a host, for example "1x1x8".
      target_config: one device in XLA's text format.
      num_devices: size of the mesh.
      options: XLA's own compiler options.

    Returns:
      XLA's executable, which can be read (`hlo_modules()`, `get_compiled_memory_stats()`) but
      not run.

    Raises:
      InputError: this JAX lacks one of the names used here.
      RuntimeError, NotImplementedError: the platform's plugin is missing or found no compiler.
    """
    import numpy as np

    or_else = "compile for the CPU"
    get_topology_desc = _require("jax.experimental.topologies.get_topology_desc", or_else=or_else)
    get_compile_options = _require("jax.extend.backend.get_compile_options", or_else=or_else)
    DeviceList = _require("jaxlib.xla_client.DeviceList", or_else=or_else)
    described = get_topology_desc(
        platform=platform, topology_name="", target_config=target_config, topology=topology
    )
    devices = tuple(described.devices)
    compile_options = get_compile_options(
        num_replicas=1,
        num_partitions=num_devices,
        device_assignment=np.arange(num_devices).reshape(1, -1),
        env_options_overrides=options,
    )
    compile_options.executable_build_options.use_spmd_partitioning = num_devices > 1
    module = traced.lower(lowering_platforms=(platform,)).compiler_ir("stablehlo")
    return devices[0].client.compile(module, DeviceList(devices), compile_options)


@contextlib.contextmanager
def cudnn_assumed(version: int, capability: tuple[int, int]) -> Iterator[None]:
    """Inside, JAX takes a GPU's compute capability and its cuDNN as given and does not look.

    JAX asks the machine that it runs on for both before it uses cuDNN attention, also if it
    compiles for another machine.
    Without it cuDNN attention compiles only where cuDNN is installed, and heads wider than 128 only
    where there is a GPU.

    Args:
      version: of cuDNN, for example 90700.
      capability: CUDA compute capability.
    """
    module = "jax._src.cudnn.fused_attention_stablehlo"
    answers = {
        "check_cudnn_version": lambda: version,
        "check_compute_capability": lambda least: capability >= tuple(map(int, least.split("."))),
    }
    found = {name: ask for name in answers if (ask := _find(f"{module}.{name}"))}
    try:
        for name in found:
            setattr(sys.modules[module], name, answers[name])
        yield
    finally:
        for name, ask in found.items():
            setattr(sys.modules[module], name, ask)


def gpu_interpreter() -> Any:
    """Returns what makes Pallas interpret a kernel for GPUs on a CPU.

    Public only from jax 0.11 on. Without it the integrator's kernels cannot be tested on a CPU.

    Raises:
      InputError: this JAX has none.
    """
    path = "jax._src.pallas.mosaic_gpu.interpret.params.InterpretGPUParams"
    return _require(path, or_else="run the kernels on a Hopper GPU")()


def on_save_failure(checkpointer: Any, callback: Callable[[BaseException], None]) -> None:
    """Has `callback(error)` called when this process cannot write its part of a checkpoint.

    Orbax's own thread calls it, before that thread waits for the other processes.
    Without it all processes wait 20 minutes for the missing part until Orbax raises; a warning
    says so.

    Args:
      checkpointer: an `orbax.checkpoint.v1.training.Checkpointer`.
      callback: gets the exception, in that thread.
    """
    manager = getattr(checkpointer, "_manager", None)
    tracker = getattr(manager, "_save_progress_tracker", None)
    if not hasattr(tracker, "set"):
        import orbax.checkpoint

        from inl_jax.console import say

        say(
            f"WARNING: orbax-checkpoint {orbax.checkpoint.__version__} cannot report a failed save "
            "at once: if one process cannot write, all end after 20 minutes"
        )
        return
    meet = tracker.set  # Orbax's barrier at both ends of a save

    def report_then_meet(saving: bool) -> None:
        error = sys.exc_info()[1]  # at the end of a save, what its thread is about to raise
        if error is not None and not saving:
            callback(error)
        meet(saving)

    tracker.set = report_then_meet


def _find(path: str) -> Any:
    """Returns what `module.name` names, or None if it is gone."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def _require(path: str, *, or_else: str) -> Any:
    found = _find(path)
    if found is None:
        import jax

        raise InputError(
            f"jax {jax.__version__} has no {path}: install a version that pyproject.toml admits, "
            f"or {or_else}"
        )
    return found
