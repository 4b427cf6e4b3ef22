"""The launchers of processes: the variables that say how many there are, and which one this is.

What only reserves hosts is no launcher: SLURM_NTASKS, for example, is set in every job.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from inl_jax.config import InputError
from inl_jax.parallel.address import spell

Env = Mapping[str, str]
ALONE = "--num_processes 1 (or JAX_NUM_PROCESSES=1) to run a single process"


class Launcher(NamedTuple):
    """The variables that a launcher sets for each of its processes."""

    name: str
    size: str = ""  # how many processes: a number, or a list of them
    rank: str = ""  # which one this is
    local_rank: str = ""  # which one of its host
    local_size: str = ""  # how many its host has
    needs: tuple[str, ...] = ()  # others that it always sets, and that are read here
    coordinator: Callable[[Env], str] = lambda env: ""  # host:port of process 0


class Launched(NamedTuple):
    """What the variables of a launcher say; None for what they do not."""

    launcher: str
    variables: str  # NAME=value, ...
    num_processes: str | None
    process_id: str | None
    coordinator: str | None
    local_rank: str | None
    local_size: str | None


def _beside_torch(env: Env) -> str:
    port = number("MASTER_PORT", env["MASTER_PORT"]) + 1  # torchrun itself listens on MASTER_PORT
    return _at(env, env["MASTER_ADDR"], port)


def _of_jax_job(env: Env) -> str:
    return _at(env, env["COORDINATOR_ADDRESS"], env["COORDINATOR_PORT"])


def _of_mpirun(env: Env) -> str:
    """Where mpirun runs, which is where it puts rank 0. Open MPI 5 does not say."""
    # 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911 or 1314521088.0;tcp6://[fe80::2,2620::2]:43370
    uri = env.get("OMPI_MCA_orte_hnp_uri", "")
    found = re.match(r"(\d+)\..*?;tcp(?:://([^,:]+)|6://\[([^,\]]+))", uri)
    return _at(env, found[2] or found[3], _port(int(found[1]) // 4096)) if found else ""


def _of_slurm(env: Env) -> str:
    """The first host of the step, and a port of its own for each step of a job."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])+", env["SLURM_STEP_NODELIST"])
    host = re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0]) if first else ""
    job, step = (number(n, env.get(n, "0")) for n in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return _at(env, host, _port(job + 251 * step))  # no two of 4,096 steps are the same


def _of_skypilot(env: Env) -> str:
    """The first of the nodes' addresses, a line each, which are in the order of their ranks."""
    addresses = env.get("SKYPILOT_NODE_IPS", "").split()
    return _at(env, addresses[0], 8476) if addresses else ""


def _port(key: int) -> int:
    """A port above those that Linux gives to clients, 32768 to 60999."""
    return 61440 + key % 4096


def _at(env: Env, host: str, port: int | str) -> str:
    return spell(host, env.get("JAX_COORDINATOR_PORT") or port)


# The innermost first: Slurm may have started mpirun, and SkyPilot torchrun.
LAUNCHERS = (
    Launcher(
        "torchrun",
        "WORLD_SIZE",
        "RANK",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        needs=("MASTER_ADDR", "MASTER_PORT"),
        coordinator=_beside_torch,
    ),
    Launcher(
        "Kubeflow JAXJob",
        "NUM_PROCESSES",
        "PROCESS_ID",
        needs=("COORDINATOR_ADDRESS", "COORDINATOR_PORT"),
        coordinator=_of_jax_job,
    ),
    Launcher(
        "Open MPI",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        needs=("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        coordinator=_of_mpirun,
    ),
    Launcher(
        "MVAPICH2",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    Launcher("Horovod", "HOROVOD_SIZE", "HOROVOD_RANK", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"),
    Launcher("MPICH, Intel MPI", "PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    Launcher("MPICH, Intel MPI", "MPI_LOCALNRANKS"),
    Launcher(
        "JSM",
        "JSM_NAMESPACE_SIZE",
        "JSM_NAMESPACE_RANK",
        "JSM_NAMESPACE_LOCAL_RANK",
        "JSM_NAMESPACE_LOCAL_SIZE",
    ),
    Launcher("Flux", "FLUX_JOB_SIZE", "FLUX_TASK_RANK", "FLUX_TASK_LOCAL_ID"),
    Launcher(
        "Slurm",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_PROCID",
        "SLURM_LOCALID",
        needs=("SLURM_LOCALID", "SLURM_STEP_NUM_NODES", "SLURM_JOB_ID", "SLURM_STEP_NODELIST"),
        coordinator=_of_slurm,
    ),
    # These start one command on each host.
    Launcher("torchrun's variables, not read by python", "PET_NNODES", "PET_NODE_RANK"),
    Launcher("SkyPilot", "SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK", coordinator=_of_skypilot),
    Launcher("dstack", "DSTACK_NODES_NUM", "DSTACK_NODE_RANK"),
    Launcher("AWS Batch", "AWS_BATCH_JOB_NUM_NODES", "AWS_BATCH_JOB_NODE_INDEX"),
    Launcher("SageMaker", "SM_HOSTS"),
    Launcher("Vertex AI", "CLUSTER_SPEC"),
    Launcher("TensorFlow's variable", "TF_CONFIG"),
    Launcher("Cloud TPU", "TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID"),
    Launcher("a launcher of nodes", "NNODES", "NODE_RANK"),
)
# These say that there may be others, and not how many.
RANKS_ALONE = (Launcher("PMIx", rank="PMIX_RANK"), Launcher("PALS", rank="PALS_RANKID"))


def read_launcher(env: Env) -> Launched | None:
    """Returns what the innermost launcher says that started this process as one of several.

    Raises:
      InputError: only some variables of a launcher are there.
    """
    env = {name: value for name, value in env.items() if value.strip()}
    spoken = [launcher for launcher in LAUNCHERS if _speaks(launcher, env)]
    if not any(launcher.size in env for launcher in LAUNCHERS):
        spoken += [launcher for launcher in RANKS_ALONE if launcher.rank in env]
    whole = [_read(launcher, env) for launcher in spoken if not _missing(launcher, env)]
    if not whole and spoken:
        missing = ", ".join(_missing(spoken[0], env))
        raise InputError(
            f"{_variables(spoken[0], env)} without {missing}: set all of them, or {ALONE}"
        )
    # Slurm sets PMI's variables too, and knows where process 0 is.
    same = [other for other in whole if other[2:4] == whole[0][2:4] and other.coordinator]
    return next(iter(same + whole), None)


def _speaks(launcher: Launcher, env: Env) -> bool:
    """Whether this launcher started the process as one of several, or may have."""
    if launcher.size in env:
        return _count(env[launcher.size]) != "1"
    if launcher.name == "Slurm":  # its ranks are set in every job, its size only by srun
        return False
    return env.get(launcher.rank, "0") != "0" or any(name in env for name in launcher.needs)


def _missing(launcher: Launcher, env: Env) -> list[str]:
    names = (launcher.size, launcher.rank, *launcher.needs)
    return [name for name in names if name and name not in env]


def _variables(launcher: Launcher, env: Env) -> str:
    names = dict.fromkeys((launcher.size, launcher.rank, *launcher.needs))
    found = ", ".join(f"{name}={env[name][:60]}" for name in names if name in env)
    return f"{found} ({launcher.name})"


def _read(launcher: Launcher, env: Env) -> Launched:
    return Launched(
        launcher.name,
        _variables(launcher, env),
        _count(env[launcher.size]) if launcher.size else None,
        env.get(launcher.rank),
        launcher.coordinator(env) or None,
        env.get(launcher.local_rank),
        _tasks_of_host(env) if launcher.name == "Slurm" else env.get(launcher.local_size),
    )


def _count(text: str) -> str:
    """How many processes a value names: 4, a:1,b:1, ["a", "b"], or a cluster of TensorFlow."""
    if text.lstrip()[:1] not in ("[", "{"):
        return str(text.count(",") + 1) if "," in text else text
    try:
        named = json.loads(text)
        roles = named["cluster"].values() if isinstance(named, dict) else [named]
        return str(sum(map(len, roles)))
    except (ValueError, KeyError, TypeError, AttributeError):
        return "1"


def _tasks_of_host(env: Env) -> str:
    """How many tasks of a Slurm step run on this host, from `4(x2),1`."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    counts = [count for count, times in found for _ in range(int(times or 1))]
    node = env.get("SLURM_NODEID", "0")
    if node.isdecimal() and int(node) < len(counts):
        return counts[int(node)]
    tasks, nodes = (number(n, env[n]) for n in ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES"))
    return str(-(-tasks // max(1, nodes)))


def number(name: str, text: str | int) -> int:
    """A whole number; `InputError` names the variable or flag if the text is none."""
    if not str(text).isdecimal():
        raise InputError(f"{name}={text}: must be a whole number, 0 or more")
    return int(text)
