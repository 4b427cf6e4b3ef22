"""Several processes, on one host or many: how they find each other, agree, and end together.

Every process runs the same program on its own devices; process 0 also writes and speaks. With one
process, and that is without a launcher, nothing here does anything.
"""

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
from jax._src.distributed import global_state  # the processes' key-value store has no public name

from inl_jax.config import InputError

START_SECONDS = 300  # for all processes to come together
PEER_SECONDS = 60  # without a sign of life, after which a process counts as dead
SHARED_SECONDS = 30  # for a file of one host to be seen by the others
ANSWER_SECONDS = 3  # for the others to hear that all end; who does not is gone
_END = "inl_jax/end"

T = TypeVar("T")


class Launch(NamedTuple):
    """One process's place among several."""

    coordinator: str  # host:port of process 0; empty where JAX asks the launcher
    num_processes: int
    process_id: int
    devices: tuple[int, ...] = ()  # its own among the GPUs it can see; empty: all of them
    launcher: str = "deactivate"  # JAX's cluster_detection_method


class Absent(RuntimeError):
    """Not all processes came together; they may the next time."""


# --- Start -------------------------------------------------------------------------------------


def find_launch(
    env: Mapping[str, str],
    *,
    coordinator: str = "",
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Launch | None:
    """This process's place, or None where it is alone. Flags stand above JAX_*, these above all.

    Variables: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID, JAX_LOCAL_DEVICE_IDS;
    of torchrun and the Kubeflow operators MASTER_ADDR, MASTER_PORT, WORLD_SIZE, RANK; of Open MPI
    and of a step of Slurm. `num_processes=1` is alone whatever the variables say.

    Args:
      env: the environment.
      coordinator: host:port of process 0.
      num_processes: how many there are.
      process_id: which this is, from 0.

    Raises:
      InputError: some are missing, or impossible.
    """
    names = {
        "coordinator": ("--coordinator", "JAX_COORDINATOR_ADDRESS"),
        "num_processes": ("--num_processes", "JAX_NUM_PROCESSES"),
        "process_id": ("--process_id", "JAX_PROCESS_ID"),
    }
    flags = (coordinator or None, num_processes, process_id)
    given = {
        key: env.get(variable) if flag is None else flag
        for (key, (_, variable)), flag in zip(names.items(), flags, strict=True)
    }
    given = {key: value for key, value in given.items() if value not in (None, "")}
    if "num_processes" in given and _number("num_processes", given["num_processes"]) == 1:
        return None
    launched = {} if len(given) == len(names) else _launched(env)
    if not given and launched.get("num_processes", 1) == 1:
        return None
    found = {"coordinator": ""} | launched | given
    missing = [key for key in names if found.get(key, "") == ""]
    if "launcher" in launched and "coordinator" not in given:
        missing.remove("coordinator")  # JAX finds it
    if missing:
        raise InputError(
            f"{', '.join(f'{key}={value}' for key, value in (launched | given).items())} without "
            f"{' and '.join(' or '.join(names[key]) for key in missing)}: give all three, or "
            "--num_processes 1 for a process on its own"
        )
    if "coordinator" in given:
        found.pop("launcher", None)
    n, i = (_number(key, found[key]) for key in ("num_processes", "process_id"))
    if not 0 <= i < n:
        raise InputError(f"process_id={i}: must lie between 0 and num_processes={n} less one")
    if found["coordinator"] and not re.fullmatch(r".+:\d+", found["coordinator"]):
        raise InputError(f"coordinator={found['coordinator']}: must be host:port of process 0")
    if ids := env.get("JAX_LOCAL_DEVICE_IDS"):
        found["devices"] = tuple(_number("JAX_LOCAL_DEVICE_IDS", part) for part in ids.split(","))
    return Launch(**found | {"num_processes": n, "process_id": i})


def _launched(env: Mapping[str, str]) -> dict:
    """What a launcher's variables say, as fields of `Launch`; empty where there is none.

    The innermost launcher counts: torchrun or mpirun may have been started by Slurm. A Slurm job
    has SLURM_NTASKS also where nothing was started by srun; only a step has SLURM_STEP_NUM_TASKS,
    which is 1 in the shell of salloc.
    """

    def read(*variables):
        missing = [v for v in variables if v not in env]
        if missing:
            found = ", ".join(f"{v}={env[v]}" for v in variables if v in env)
            raise InputError(
                f"{found} without {', '.join(missing)}: set all of them, or give --num_processes "
                "1 for a process on its own"
            )
        return [env[v] for v in variables]

    torch = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")
    if all(v in env for v in torch):
        address, port, n, i = read(*torch)
        n, i = _number("WORLD_SIZE", n), _number("RANK", i)
        # torchrun itself listens on MASTER_PORT.
        found = {"coordinator": f"{address}:{_number('MASTER_PORT', port) + 1}"}
        local, on_host = env.get("LOCAL_RANK", "0"), env.get("LOCAL_WORLD_SIZE", "1")
    elif "OMPI_COMM_WORLD_SIZE" in env:
        n, i, local, on_host = read(
            "OMPI_COMM_WORLD_SIZE",
            "OMPI_COMM_WORLD_RANK",
            "OMPI_COMM_WORLD_LOCAL_RANK",
            "OMPI_COMM_WORLD_LOCAL_SIZE",
        )
        # Open MPI 5 does not say where mpirun runs, so there the coordinator must be given.
        found = {"launcher": "ompi"} if "OMPI_MCA_orte_hnp_uri" in env else {}
    elif "SLURM_STEP_NUM_TASKS" in env and env["SLURM_STEP_NUM_TASKS"] != "1":
        n, i, local, nodes, *_ = read(
            "SLURM_STEP_NUM_TASKS",
            "SLURM_PROCID",
            "SLURM_LOCALID",
            "SLURM_STEP_NUM_NODES",
            "SLURM_JOB_ID",
            "SLURM_STEP_NODELIST",
            "SLURM_NTASKS",
        )
        found, on_host = {"launcher": "slurm"}, "1" if nodes == n else "several"
    elif any(v in env for v in torch) and env.get("WORLD_SIZE") != "1":
        read(*torch)  # says what is missing
    else:
        return {}
    # Several processes that see the same GPUs take one each.
    visible = env.get("CUDA_VISIBLE_DEVICES", "").split(",")
    alone = on_host == "1" or (visible != [""] and len(visible) == 1)
    found["devices"] = () if alone else (_number("local rank", local),)
    return found | {
        "num_processes": _number("number of processes", n),
        "process_id": _number("rank", i),
    }


def _number(name: str, text: str | int) -> int:
    if not str(text).isdecimal():
        raise InputError(f"{name}={text}: must be a whole number, 0 or more")
    return int(text)


def start(
    launch: Launch | None, *, start_timeout: int = START_SECONDS, peer_timeout: int = PEER_SECONDS
) -> None:
    """Joins the other processes. Before JAX first looks at its devices; None does nothing.

    From here on a failure of any process ends all of them (see `end`).

    Args:
      launch: from `find_launch`.
      start_timeout: seconds for all to come together.
      peer_timeout: seconds without a sign of life after which a process counts as dead.

    Raises:
      Absent: the others did not come in time.
      InputError: process 0 cannot listen on its port, or a timeout is none.
    """
    for name, seconds in (("start_timeout", start_timeout), ("peer_timeout", peer_timeout)):
        if seconds < 1:
            raise InputError(f"{name}={seconds}: must be 1 second or more")
    if launch is None:
        return
    if launch.process_id == 0 and launch.coordinator:  # JAX would crash
        port = int(launch.coordinator.rsplit(":", 1)[1])
        try:
            socket.create_server(("", port)).close()
        except (OSError, OverflowError) as error:
            raise InputError(
                f"coordinator={launch.coordinator}: process 0 cannot listen on port {port} "
                f"({error}); choose a free one, and give the processes different ids"
            ) from None
    # XLA's own handler would take SIGTERM and leave us without it.
    jax.config.update("jax_enable_preemption_service", False)
    trouble: list[Exception] = []

    def connect():
        try:
            jax.distributed.initialize(
                launch.coordinator or None,
                launch.num_processes,
                launch.process_id,
                launch.devices,
                cluster_detection_method=launch.launcher,
                initialization_timeout=start_timeout + 60,
                heartbeat_timeout_seconds=peer_timeout,
                shutdown_timeout_seconds=peer_timeout,
            )
        except Exception as error:
            trouble.append(error)

    # In a thread, because at its own timeout JAX aborts the process with a stack trace.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(start_timeout)
    if thread.is_alive() or trouble:
        where = launch.coordinator or f"the address that {launch.launcher} gives"
        reason = str(trouble[0]).splitlines()[0] if trouble else f"within {start_timeout} s"
        raise Absent(
            f"coordinator={where}: process {launch.process_id} of {launch.num_processes} did not "
            f"meet the others there ({reason}): start all of them, with an address and a free port "
            "of process 0's host that every host can reach"
        )
    _joined.set()
    threading.Thread(target=_watch, daemon=True).start()


# --- Agree -------------------------------------------------------------------------------------

_calls = itertools.count()


def first() -> bool:
    """Whether this is process 0, which writes and speaks."""
    return global_state.process_id == 0


def say(line: str) -> None:
    """Prints a line, once for all processes."""
    if first():
        print(line, flush=True)


def gather(value: str = "") -> list[str]:
    """What each process gave, in their order. Waits for all; every process calls it alike."""
    n, me, call = global_state.num_processes, global_state.process_id, next(_calls)
    if n == 1:
        return [value]
    client, key = global_state.client, f"inl_jax/{call}"
    if me == 0:
        values = [value, *(_wait_for(f"{key}/{i}") for i in range(1, n))]
        client.key_value_set(key, json.dumps(values))
        return values
    client.key_value_set(f"{key}/{me}", value)
    return json.loads(_wait_for(key))


def _wait_for(key: str) -> str:
    """A value of the store, however long it takes: a dead process ends this one."""
    while True:
        try:  # in slices, between which Python sees signals
            return global_state.client.blocking_key_value_get(key, 1000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        if ended := _ended():  # also at the end, where nobody watches
            _leave(*ended)


def check_same(what: str, value: str, advice: str) -> None:
    """Raises `InputError` on every process where `value` is not the same on all of them."""
    values = gather(value)
    for i, other in enumerate(values):
        if other != values[0]:
            raise InputError(
                f"{what} is {other} on process {i} and {values[0]} on process 0: {advice}"
            )


def check_shared(directory: Path, name: str) -> None:
    """Raises `InputError` where not all processes can write in `directory` and see what others do.

    It is tried: each writes a file of its own, and then looks for process 0's.
    """
    if global_state.num_processes == 1:
        return
    secret = gather(uuid.uuid4().hex)[0]
    marks = [directory / f".shared-{secret}-{i}" for i in range(global_state.num_processes)]
    mine, trouble = marks[global_state.process_id], ""
    try:
        mine.touch()
    except OSError as error:
        trouble = f"cannot write there ({error.strerror})"
    gather()
    until = time.monotonic() + SHARED_SECONDS
    while not (seen := marks[0].exists()) and not trouble and time.monotonic() < until:
        time.sleep(0.5)
    if not (seen or trouble):
        trouble = "does not see there what process 0 wrote"
    troubles = gather(trouble)
    with contextlib.suppress(OSError):
        mine.unlink()
    for i, trouble in enumerate(troubles):
        if trouble:
            raise InputError(
                f"{name}={directory}: process {i} {trouble}; name a directory on a file system "
                "that all hosts share and may write"
            )


def once_for_each_copy(directory: Path, work: Callable[[], T]) -> T:
    """`work()` on every process, but never at the same time on two that share `directory`.

    Where all hosts share it, process 0 is first and the others find what it left; where each has
    its own, one process of each is first.
    """
    if global_state.num_processes == 1:
        return work()
    mark = directory / f".first-{gather(uuid.uuid4().hex)[0]}"
    mine = False
    for turn in (first(), not first()):
        if turn:
            with contextlib.suppress(FileExistsError):
                mark.touch(exist_ok=False)
                mine = True
        gather()
    if mine:
        mark.unlink()
        result = work()
    gather()
    return result if mine else work()


# --- End ---------------------------------------------------------------------------------------

_joined = threading.Event()  # the store answers
_ending = threading.Event()  # the main thread is at the end already


def end(code: int, message: str = "") -> int:
    """The last call of a program: gives its exit code back, with several processes the same on all.

    With a message, which is a failure that the others may not share, they all end now. The first
    to fail shows its message, or says which process was lost; process 0 says who that was.
    """
    _ending.set()
    if _joined.is_set() and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # launchers send it when the first has ended
    if message and _joined.is_set():
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first, or all is lost
            global_state.client.key_value_set(_END, f"{code} {global_state.process_id}")
        code, speaker = _ended() or (code, global_state.process_id)
        _leave(code, speaker, message)
    if message:
        print(message, file=sys.stderr)
        if global_state.client is not None:  # JAX would wait for those it never met
            sys.stderr.flush()
            os._exit(code)
    elif _joined.is_set():
        gather()
    return code


def _watch() -> None:
    """Ends this process when another has failed, also while it waits for the devices."""
    while not _ending.wait(1):
        ended = _ended()
        if ended and not _ending.is_set():
            _leave(*ended)


def _ended() -> tuple[int, int] | None:
    """The exit code for all, and the process that gave it; None where no process failed."""
    try:
        code, process = global_state.client.key_value_try_get(_END).split()
    except jax.errors.JaxRuntimeError:
        return None
    return int(code), int(process)


_leaving = threading.Lock()


def _leave(code: int, speaker: int, message: str = "") -> None:
    """Ends this process at once: nothing of JAX may wait here for processes that have gone."""
    _leaving.acquire()  # the thread that comes second waits for the end
    me, n = global_state.process_id, global_state.num_processes
    others = [i for i in range(n) if i != me]
    if me == speaker:
        if lost := _without_answer(others, ANSWER_SECONDS):
            message = (
                f"error: process {', '.join(map(str, lost))} of {n} is gone or hangs, so all end; "
                f"the same command goes on from the last checkpoint ({message.splitlines()[-1]})"
            )
        print(message, file=sys.stderr)
    elif me == 0:
        print(f"process {speaker} of {n} ends all with exit code {code}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        global_state.client.key_value_set(f"{_END}/{me}", "")
    if me == 0:  # the store lives here: until the speaker has heard the others, and all have gone
        if me != speaker:
            _without_answer([speaker], 2 * ANSWER_SECONDS)
        time.sleep(1)
    os._exit(code)


def _without_answer(processes: list[int], seconds: float) -> list[int]:
    """Those that have not said within so many seconds that they leave, too."""
    until, lost = time.monotonic() + seconds, []
    for i in processes:
        left = max(1, int(1000 * (until - time.monotonic())))
        try:
            global_state.client.blocking_key_value_get(f"{_END}/{i}", left)
        except jax.errors.JaxRuntimeError:
            lost.append(i)
    return lost
