"""Which process this is, among how many: read from flags or from a launcher's variables."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from inl_jax.config import InputError


class Launch(NamedTuple):
    """The place of one process among several."""

    coordinator: str  # host:port of process 0; empty if JAX asks the launcher for it
    num_processes: int
    process_id: int
    devices: tuple[int, ...] = ()  # indices among the visible GPUs; empty for all of them
    launcher: str = "deactivate"  # JAX's cluster_detection_method


# The flag and the variable that give a field of `Launch`.
_SOURCES = {
    "coordinator": ("--coordinator", "JAX_COORDINATOR_ADDRESS"),
    "num_processes": ("--num_processes", "JAX_NUM_PROCESSES"),
    "process_id": ("--process_id", "JAX_PROCESS_ID"),
}
_TORCH = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")
_OPEN_MPI = (
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)
_SLURM = (
    "SLURM_STEP_NUM_TASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_STEP_NUM_NODES",
    "SLURM_JOB_ID",  # this and the next two: JAX reads them
    "SLURM_STEP_NODELIST",
    "SLURM_NTASKS",
)


def find_launch(
    env: Mapping[str, str],
    *,
    coordinator: str = "",
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Launch | None:
    """Returns the place of this process among several, or None for a single process.

    Flags override JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, which override the
    variables of a launcher: torchrun and the Kubeflow operators (MASTER_ADDR, MASTER_PORT,
    WORLD_SIZE, RANK), Open MPI, or a Slurm step. JAX_LOCAL_DEVICE_IDS chooses GPUs. A flag or
    JAX variable of 1 process means a single process, whatever the launcher says.

    Args:
      env: the environment.
      coordinator: the flag, host:port of process 0.
      num_processes: the flag.
      process_id: the flag, from 0.

    Raises:
      InputError: a value is missing or impossible.
    """
    flags = (coordinator or None, num_processes, process_id)
    given = {
        field: env.get(variable) if flag is None else flag
        for (field, (_, variable)), flag in zip(_SOURCES.items(), flags, strict=True)
    }
    given = {field: value for field, value in given.items() if value not in (None, "")}
    if "num_processes" in given and _number("num_processes", given["num_processes"]) == 1:
        return None
    launched = {} if len(given) == len(_SOURCES) else _read_launcher(env)
    if not given and launched.get("num_processes", 1) == 1:
        return None
    found = {"coordinator": ""} | launched | given
    missing = [field for field in _SOURCES if found.get(field, "") == ""]
    if "launcher" in launched and "coordinator" not in given:
        missing.remove("coordinator")  # JAX asks the launcher
    if missing:
        raise InputError(
            f"{', '.join(f'{field}={value}' for field, value in (launched | given).items())} "
            f"without {' and '.join(' or '.join(_SOURCES[field]) for field in missing)}: give all "
            "three, or --num_processes 1 to run a single process"
        )
    if "coordinator" in given:
        found.pop("launcher", None)
    n, i = (_number(field, found[field]) for field in ("num_processes", "process_id"))
    if i >= n:
        raise InputError(f"process_id={i}: must be less than num_processes={n}; the first is 0")
    if found["coordinator"] and not re.fullmatch(r".+:\d+", found["coordinator"]):
        raise InputError(f"coordinator={found['coordinator']}: must be host:port of process 0")
    if ids := env.get("JAX_LOCAL_DEVICE_IDS"):
        found["devices"] = tuple(_number("JAX_LOCAL_DEVICE_IDS", part) for part in ids.split(","))
    return Launch(**found | {"num_processes": n, "process_id": i})


def _read_launcher(env: Mapping[str, str]) -> dict:
    """Returns the fields of `Launch` that a launcher's variables give; empty without a launcher."""
    # The innermost launcher counts: Slurm may have started torchrun or mpirun.
    if all(variable in env for variable in _TORCH):
        address, port, n, i = (env[variable] for variable in _TORCH)
        n, i = _number("WORLD_SIZE", n), _number("RANK", i)
        # torchrun itself listens on MASTER_PORT.
        found = {"coordinator": f"{address}:{_number('MASTER_PORT', port) + 1}"}
        local_rank, on_this_host = env.get("LOCAL_RANK", "0"), env.get("LOCAL_WORLD_SIZE", "1")
    elif "OMPI_COMM_WORLD_SIZE" in env:
        n, i, local_rank, on_this_host = _read_all(env, _OPEN_MPI)
        # Open MPI 5 does not say where mpirun runs: there the user must give the coordinator.
        found = {"launcher": "ompi"} if "OMPI_MCA_orte_hnp_uri" in env else {}
    # SLURM_NTASKS is set in every job, SLURM_STEP_NUM_TASKS only in a step, that is by srun; in the
    # shell of salloc it is 1.
    elif env.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        n, i, local_rank, num_hosts, *_ = _read_all(env, _SLURM)
        found, on_this_host = {"launcher": "slurm"}, "1" if num_hosts == n else "several"
    elif any(variable in env for variable in _TORCH) and env.get("WORLD_SIZE") != "1":
        _read_all(env, _TORCH)  # raises, because one is missing
    else:
        return {}
    # Processes of one host that see the same GPUs take one each.
    visible = env.get("CUDA_VISIBLE_DEVICES", "").split(",")
    one_gpu = visible != [""] and len(visible) == 1
    takes_all = on_this_host == "1" or one_gpu
    found["devices"] = () if takes_all else (_number("local rank", local_rank),)
    return found | {
        "num_processes": _number("number of processes", n),
        "process_id": _number("rank", i),
    }


def _read_all(env: Mapping[str, str], variables: tuple[str, ...]) -> list[str]:
    if missing := [variable for variable in variables if variable not in env]:
        found = ", ".join(
            f"{variable}={env[variable]}" for variable in variables if variable in env
        )
        raise InputError(
            f"{found} without {', '.join(missing)}: set all of them, or give --num_processes 1 to "
            "run a single process"
        )
    return [env[variable] for variable in variables]


def _number(name: str, text: str | int) -> int:
    if not str(text).isdecimal():
        raise InputError(f"{name}={text}: must be a whole number, 0 or more")
    return int(text)
