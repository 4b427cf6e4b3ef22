"""Several processes, on one host or many: they join, agree on values, and end together.

Every process runs the same program on its own devices. Process 0 also writes files and prints.
With a single process every function here is a no-op.
"""

import contextlib
import itertools
import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import jax

from inl_jax import console
from inl_jax.config import InputError
from inl_jax.console import say
from inl_jax.internals import distributed_state
from inl_jax.parallel import meeting
from inl_jax.parallel.address import split, trouble_reaching
from inl_jax.parallel.launch import Launch
from inl_jax.parallel.launchers import ALONE

START_SECONDS = 300  # for all processes to join
PEER_SECONDS = 60  # a process that sends no heartbeat for so long counts as dead
SHARED_SECONDS = 30  # for a file that one host writes to appear on the others
SAY_SECONDS = 10  # of waiting, until a line says so; then at twice the time
ANSWER_SECONDS = 3  # for the others to answer when all end; a process that does not is lost
_END = "inl_jax/end"  # key of the store: exit code and id of the process that failed first

T = TypeVar("T")

_SINGLE = SimpleNamespace(process_id=0, num_processes=1, client=None)


class PeersMissing(RuntimeError):
    """Some processes did not join in time. The same command may work the next time."""


def _state() -> Any:
    return distributed_state() if jax.distributed.is_initialized() else _SINGLE


class _Waiting:
    """Says how long something is awaited, ever more rarely."""

    def __init__(self):
        self._start, self._next = time.monotonic(), SAY_SECONDS

    def to_say(self) -> str:
        """The time waited, after 10 s, 20 s, 40 s and so on; empty in between."""
        waited = time.monotonic() - self._start
        if waited < self._next:
            return ""
        self._next *= 2
        return console.duration(waited)


# --- Start -------------------------------------------------------------------------------------


def start(
    launch: Launch | None, *, start_timeout: int = START_SECONDS, peer_timeout: int = PEER_SECONDS
) -> None:
    """Joins the other processes; None does nothing. Call it before JAX starts its devices.

    Afterwards only process 0 says lines, and a failure of any process ends all (see `end`).

    Args:
      launch: from `find_launch`.
      start_timeout: seconds for all processes to join.
      peer_timeout: seconds without a heartbeat after which a process counts as dead.

    Raises:
      PeersMissing: not all processes joined in time.
      InputError: a timeout is below 1, process 0 cannot listen on its port, this JAX cannot join
        processes, or the processes run different versions or cannot find each other's hosts.
    """
    for name, seconds in (("start_timeout", start_timeout), ("peer_timeout", peer_timeout)):
        if seconds < 1:
            raise InputError(f"{name}={seconds}: must be 1 second or more")
    if launch is None:
        return
    distributed_state()  # raises now rather than after the others have joined
    meeting.check_address(launch)
    # gRPC would look for process 0 through the proxy of http_proxy, and never find it.
    os.environ.setdefault("no_grpc_proxy", split(launch.coordinator)[0])
    jax.config.update("jax_check_proxy_envs", False)  # JAX would warn of it
    # XLA would install its own handler of SIGTERM in place of ours.
    jax.config.update("jax_enable_preemption_service", False)
    errors: list[Exception] = []

    def connect():
        try:
            jax.distributed.initialize(
                launch.coordinator,
                launch.num_processes,
                launch.process_id,
                launch.devices,
                cluster_detection_method="deactivate",
                initialization_timeout=start_timeout + 60,
                heartbeat_timeout_seconds=peer_timeout,
                shutdown_timeout_seconds=peer_timeout,
            )
        except Exception as error:
            errors.append(error)

    # In a thread, because JAX aborts the process with a stack trace at its own timeout.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    waiting, until = _Waiting(), time.monotonic() + start_timeout
    while thread.is_alive() and (left := until - time.monotonic()) > 0:
        thread.join(min(1, left))
        if thread.is_alive() and (waited := waiting.to_say()):
            say(f"{meeting.what_is_awaited(launch)} ({waited} so far); give {ALONE}")
    if thread.is_alive() or errors:
        reason = console.first_line(errors[0]) if errors else f"within {start_timeout} s"
        trouble = trouble_reaching(launch.coordinator)
        raise PeersMissing(
            f"coordinator={launch.coordinator}: process {launch.process_id} of "
            f"{launch.num_processes} did not meet the others there "
            f"({reason}{trouble and f'; {trouble}'}): start all of them, with an address and a "
            f"free port of process 0's host that every host can reach, or {ALONE}"
        )
    if launch.process_id != 0:
        console.mute(True)
    _joined.set()
    threading.Thread(target=_watch, daemon=True).start()
    meeting.check_peers(gather(meeting.describe_self(launch.num_processes)))


# --- Agree -------------------------------------------------------------------------------------

_calls = itertools.count()


def first() -> bool:
    """Returns whether this is process 0, which writes files and prints."""
    return _state().process_id == 0


def gather(value: str = "") -> list[str]:
    """Returns the values of all processes, by process id. Every process must call it.

    It waits for all of them, so without a value it is a barrier.
    """
    state, call = _state(), next(_calls)
    if state.num_processes == 1:
        return [value]
    key = f"inl_jax/{call}"
    if state.process_id == 0:
        values = [value, *(_wait_for(f"{key}/{i}", i) for i in range(1, state.num_processes))]
        state.client.key_value_set(key, json.dumps(values))
        return values
    state.client.key_value_set(f"{key}/{state.process_id}", value)
    return json.loads(_wait_for(key, 0))


def _wait_for(key: str, process: int) -> str:
    """Returns a value of the store once `process` has set it. If a process has failed, exits."""
    waiting = _Waiting()
    while True:
        try:  # one second at a time: Python handles signals in between
            return _state().client.blocking_key_value_get(key, 1000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        if failure := _failure():  # `_watch` does not look any more once `end` is called
            _exit(*failure)
        if waited := waiting.to_say():
            say(f"waiting for process {process} of {_state().num_processes} ({waited} so far)")


def meeting_first(program: Callable[..., T]) -> Callable[..., T]:
    """`program`, compiled, which waits at its first call until all processes call it.

    Programs exchange values between processes. XLA waits for the first exchange of a group of
    devices only 30 s on CPUs, and processes may differ by more in compiling or reading.
    """
    if _state().num_processes == 1:
        return program
    met = False

    def call(*args: Any) -> T:
        nonlocal met
        if not met:
            gather()
            met = True
        return program(*args)

    return call


def call_together(jitted: Any, *args: Any, **fields: Any) -> Any:
    """`jitted(*args, **fields)`, once every process has compiled it. See `meeting_first`."""
    if _state().num_processes > 1:
        jitted.lower(*args, **fields).compile()  # the call finds the program
        gather()
    return jitted(*args, **fields)


def call_later(jitted: Any, *args: Any) -> Callable[[], Any]:
    """Compiles `jitted(*args)` in a thread, beside what this one does.

    Returns:
      A function to call once: it waits for the program and runs it, once every process does.
    """
    pool = ThreadPoolExecutor(1)
    compiled = pool.submit(jitted.lower(*args).compile)
    pool.shutdown(wait=False)
    return lambda: meeting_first(compiled.result())(*args)


def check_same(what: str, value: str, advice: str) -> None:
    """Raises `InputError` on every process if `value` is not the same on all of them."""
    values = gather(value)
    for i, other in enumerate(values):
        if other != values[0]:
            raise InputError(
                f"{what} is {other} on process {i} and {values[0]} on process 0: {advice}"
            )


def check_shared(directory: Path, name: str) -> None:
    """Checks that all processes can write in `directory`, and see there what process 0 writes.

    Each process creates a file of its own, then looks for the file of process 0.

    Raises:
      InputError: on every process, if one of them cannot. It names the field `name`.
    """
    state = _state()
    if state.num_processes == 1:
        return
    token = gather(uuid.uuid4().hex)[0]
    own = directory / f".shared-{token}-{state.process_id}"
    of_process_0 = directory / f".shared-{token}-0"
    problem = ""
    try:
        own.touch()
    except OSError as error:
        problem = f"cannot write there ({error.strerror})"
    gather()
    until = time.monotonic() + SHARED_SECONDS
    while not (seen := of_process_0.exists()) and not problem and time.monotonic() < until:
        time.sleep(0.5)
    if not (seen or problem):
        problem = "does not see there what process 0 wrote"
    problems = gather(problem)
    with contextlib.suppress(OSError):
        own.unlink()
    for i, problem in enumerate(problems):
        if problem:
            raise InputError(
                f"{name}={directory}: process {i} {problem}; name a directory on a file system "
                "that all hosts share and can write"
            )


def one_process_first(directory: Path, work: Callable[[], T]) -> T:
    """Returns `work()`. Of the processes that share `directory`, one calls it before the others.

    So `work` can fill a cache that the others then find. If all hosts share the directory, process
    0 is first; if each host has its own, one process of each host is.
    """
    if _state().num_processes == 1:
        return work()
    mark = directory / f".first-{gather(uuid.uuid4().hex)[0]}"
    goes_first = False
    for may_try in (first(), not first()):  # process 0 before the others
        if may_try:
            with contextlib.suppress(FileExistsError):
                mark.touch(exist_ok=False)
                goes_first = True
        gather()
    if goes_first:
        mark.unlink()
        result = work()
    gather()
    return result if goes_first else work()


# --- End ---------------------------------------------------------------------------------------

_joined = threading.Event()  # the store can be used
_ending = threading.Event()  # the main thread has called `end`
_exiting = threading.Lock()


def end(code: int, message: str = "") -> int:
    """Returns the exit code, once all processes are done. Call it last in a program.

    A message means a failure, which the other processes may not notice: all processes then exit at
    once with the code of the first that failed. That process prints its message, or which
    processes were lost; process 0 prints which process failed.
    """
    _ending.set()
    if _joined.is_set() and threading.current_thread() is threading.main_thread():
        # Launchers send it to the others when the first process has ended.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if message and _joined.is_set():
        state = _state()
        # The store refuses a second value: another process failed first, or the store is lost.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            state.client.key_value_set(_END, f"{code} {state.process_id}")
        code, failed = _failure() or (code, state.process_id)
        _exit(code, failed, message)
    if message:
        console.complain(message)
        if jax.distributed.is_initialized():  # JAX would wait at exit for processes it never met
            console.flush()
            os._exit(code)
    elif _joined.is_set():
        gather()
    return code


def _watch() -> None:
    """Exits when another process has failed, even while the main thread waits for the devices."""
    while not _ending.wait(1):
        failure = _failure()
        if failure and not _ending.is_set():
            _exit(*failure)


def _failure() -> tuple[int, int] | None:
    """Returns the exit code and the process that failed first; None if none has failed."""
    try:
        code, process = _state().client.key_value_try_get(_END).split()
    except jax.errors.JaxRuntimeError:
        return None
    return int(code), int(process)


def _exit(code: int, failed: int, message: str = "") -> None:
    """Exits at once: JAX's own exit would wait for processes that have gone."""
    _exiting.acquire()  # never released: a second thread stays here until the process is gone
    state = _state()
    me, n = state.process_id, state.num_processes
    if me == failed:
        if lost := _silent([i for i in range(n) if i != me], ANSWER_SECONDS):
            message = (
                f"error: process {', '.join(map(str, lost))} of {n} is gone or hangs, so all end; "
                "the same command resumes from the last checkpoint "
                f"({message.splitlines()[-1]})"
            )
        console.complain(message)
    elif me == 0:
        console.complain(f"process {failed} of {n} ends all with exit code {code}")
    console.flush()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        state.client.key_value_set(f"{_END}/{me}", "")  # the answer to the failed process
    if me == 0:  # the store lives here, and the failed process still reads the answers
        if me != failed:
            _silent([failed], 2 * ANSWER_SECONDS)
        time.sleep(1)
    os._exit(code)


def _silent(processes: list[int], seconds: float) -> list[int]:
    """Returns the processes that do not answer, within `seconds` for all, that they exit too."""
    until, silent = time.monotonic() + seconds, []
    for i in processes:
        left = max(1, int(1000 * (until - time.monotonic())))
        try:
            _state().client.blocking_key_value_get(f"{_END}/{i}", left)
        except jax.errors.JaxRuntimeError:
            silent.append(i)
    return silent
