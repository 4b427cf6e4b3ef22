"""Which process this is, among how many: read from flags or from a launcher's variables."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from inl_jax.config import InputError
from inl_jax.console import plural
from inl_jax.parallel.address import split
from inl_jax.parallel.launchers import ALONE, Launched, number, read_launcher


class Launch(NamedTuple):
    """The place of one process among several."""

    coordinator: str  # host:port of process 0
    num_processes: int
    process_id: int
    devices: tuple[int, ...] = ()  # indices among the visible GPUs; empty for all of them
    launcher: str = ""  # that gave the coordinator; empty if a flag or JAX's variable did


DEVICE_FILES = Path("/dev")  # NVIDIA's driver has a file for each GPU there
# The flag and the variable that give a field of `Launch`.
_SOURCES = {
    "coordinator": ("--coordinator", "JAX_COORDINATOR_ADDRESS"),
    "num_processes": ("--num_processes", "JAX_NUM_PROCESSES"),
    "process_id": ("--process_id", "JAX_PROCESS_ID"),
}


def find_launch(
    env: Mapping[str, str],
    *,
    coordinator: str = "",
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Launch | None:
    """Returns the place of this process among several, or None for a single process.

    Flags override JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, which override the
    variables of a launcher (`launchers.LAUNCHERS`). JAX_COORDINATOR_PORT replaces the port that
    these give, and JAX_LOCAL_DEVICE_IDS chooses GPUs. A flag or JAX variable of 1 process means a
    single process, whatever the launcher says.

    Args:
      env: the environment.
      coordinator: the flag, host:port of process 0.
      num_processes: the flag.
      process_id: the flag, from 0.

    Raises:
      InputError: a value is missing or impossible, or a launcher started several processes and
        does not say where process 0 is.
    """
    flags = (coordinator or None, num_processes, process_id)
    given = {
        field: env.get(variable) if flag is None else flag
        for (field, (_, variable)), flag in zip(_SOURCES.items(), flags, strict=True)
    }
    given = {field: value for field, value in given.items() if value not in (None, "")}
    if "num_processes" in given and number("num_processes", given["num_processes"]) == 1:
        return None
    launched = None if len(given) == len(_SOURCES) else read_launcher(env)
    if not given and launched is None:
        return None
    of_launcher = {field: getattr(launched, field) for field in _SOURCES} if launched else {}
    found = {field: value for field, value in of_launcher.items() if value is not None} | given
    if missing := [field for field in _SOURCES if field not in found]:
        said = [f"{field}={value}" for field, value in given.items()]
        said += [launched.variables] if launched else []
        raise InputError(
            f"{', '.join(said)} without {' and '.join(' or '.join(_SOURCES[f]) for f in missing)}: "
            f"give {'it' if len(missing) == 1 else 'them'} to each process, or {ALONE}"
        )
    n, i = (number(field, found[field]) for field in ("num_processes", "process_id"))
    if n == 0:
        raise InputError("num_processes=0: must be 1 or more")
    if i >= n:
        raise InputError(f"process_id={i}: must be less than num_processes={n}; the first is 0")
    split(found["coordinator"])  # raises if it is misspelt
    if ids := env.get("JAX_LOCAL_DEVICE_IDS"):
        devices = tuple(number("JAX_LOCAL_DEVICE_IDS", part) for part in ids.split(","))
    else:
        devices = _share_of_gpus(env, launched) if launched else ()
    by_launcher = launched.launcher if launched and "coordinator" not in given else ""
    return Launch(found["coordinator"], n, i, devices, by_launcher)


def _share_of_gpus(env: Mapping[str, str], launched: Launched) -> tuple[int, ...]:
    """The GPUs of this process: an equal part of those that the processes of its host all see.

    Empty for all that it sees.
    """
    alone = launched.local_rank is None or launched.local_size == "1"
    if alone or env.get("JAX_PLATFORMS") == "cpu":
        return ()
    i, visible = number("local rank", launched.local_rank), visible_gpus(env)
    if visible is None or launched.local_size is None:
        return (i,)
    # srun --gpus-per-task shows each task other GPUs, and a wrapper script often a single one.
    on_host = env.get("SLURM_GPUS_ON_NODE", "") if launched.launcher == "Slurm" else ""
    of_its_own = visible < int(on_host) if on_host.isdecimal() else False
    if of_its_own or visible == 0 or (visible == 1 and env.get("CUDA_VISIBLE_DEVICES")):
        return ()
    n = number("processes of this host", launched.local_size)
    if visible % n:
        raise InputError(
            f"{n} processes on this host share {plural(visible, 'GPU')} ({launched.launcher}), "
            f"which does not divide: start {_divisors(visible)} on a host, or choose the GPUs of "
            "each by JAX_LOCAL_DEVICE_IDS"
        )
    each = visible // n
    return tuple(range(i * each, (i + 1) * each))


def visible_gpus(env: Mapping[str, str]) -> int | None:
    """How many GPUs CUDA shows to this process; None if nothing says so."""
    if (chosen := env.get("CUDA_VISIBLE_DEVICES")) is not None:
        names = [name.strip() for name in chosen.split(",")]
        ends = [i for i, name in enumerate(names) if name in ("", "-1", "NoDevFiles")]
        return ends[0] if ends else len(names)  # CUDA reads up to the first that is none
    return len(list(DEVICE_FILES.glob("nvidia[0-9]*"))) or None


def _divisors(number: int) -> str:
    *most, last = [str(n) for n in range(1, number + 1) if number % n == 0]
    return f"{', '.join(most)} or {last}" if most else last
