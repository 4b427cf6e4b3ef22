"""What may keep processes from meeting: the address of process 0, their versions, their hosts."""

import ipaddress
import json
import os
import socket

from inl_jax.config import InputError
from inl_jax.console import plural, say
from inl_jax.environment import source_digest, versions
from inl_jax.parallel.address import (
    check_free,
    is_of_this_host,
    split,
    trouble_reaching,
    trouble_resolving,
)
from inl_jax.parallel.launch import Launch, visible_gpus

# Only process 0 uses them.
_OF_TRACKERS = {"tensorboardX", "wandb", "trackio"}


def check_address(launch: Launch) -> None:
    """Says what is odd about the address of process 0, before a process looks for it there.

    Raises:
      InputError: process 0 cannot listen on its port.
    """
    where, port = launch.coordinator, split(launch.coordinator)[1]
    if trouble := trouble_resolving(where):
        say(f"WARNING: coordinator={where}: {trouble}; this process waits until it does")
    if launch.process_id != 0:
        return
    if not is_of_this_host(where):
        say(
            f"WARNING: coordinator={where}: no address of this host, {socket.gethostname()}, where "
            "process 0 runs; the others look for it there"
        )
    try:
        check_free(where)  # JAX would crash
    except OSError as error:
        advice = "choose a free port, and give each process its own id"
        if launch.launcher:
            advice = (
                f"set JAX_COORDINATOR_PORT to a free port in place of {launch.launcher}'s, the "
                "same for all processes, or give --coordinator"
            )
        raise InputError(
            f"coordinator={where}: process 0 cannot listen on port {port} "
            f"({os.strerror(error.errno)}); {advice}"
        ) from None


def what_is_awaited(launch: Launch) -> str:
    """A line for a process that waits for the others to join."""
    i, n, where = launch.process_id, launch.num_processes, launch.coordinator
    if trouble := trouble_reaching(where):
        return f"process {i} of {n} waits for process 0 at {where}: {trouble}"
    if i == 0:
        return f"process 0 waits at {where} for {plural(n - 1, 'other process')} of {n} to join"
    return f"process {i} of {n} has reached process 0 at {where} and waits for the others"


def describe_self(num_processes: int) -> str:
    """What `check_peers` compares, of this process, which was told how many there are."""
    compute = {k: version for k, version in versions().items() if k not in _OF_TRACKERS}
    name = socket.gethostname()
    try:
        address = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError:
        address = ""
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not visible_gpus(os.environ)
    found = compute | {"source of inl_jax": source_digest()}
    told = {"host": [name, address], "on_cpu": on_cpu, "num_processes": num_processes}
    return json.dumps({"versions": found} | told)


def check_peers(described: list[str]) -> None:
    """Checks that the processes are as many, run the same versions and can find each other's hosts.

    gloo, XLA's exchange between CPUs, listens on the address of the host's own name. XLA starts it
    beside GPUs too, and then does not use it.

    Args:
      described: from `describe_self` of each process.

    Raises:
      InputError: they cannot train together.
    """
    peers = [json.loads(peer) for peer in described]
    several_hosts = len({peer["host"][0] for peer in peers}) > 1
    for i, peer in enumerate(peers):
        if (told := peer["num_processes"]) != len(peers):
            raise InputError(
                f"process {i} has num_processes={told}, and {len(peers)} joined: start all with "
                "the same number"
            )
        first, found = peers[0]["versions"], peer["versions"]
        if names := sorted(k for k in first | found if first.get(k) != found.get(k)):
            here, there = (
                ", ".join(f"{name} {known.get(name, 'missing')}" for name in names)
                for known in (first, found)
            )
            raise InputError(
                f"process {i} has {there}, and process 0 has {here}: install the same versions "
                "for all processes"
            )
        name, address = peer["host"]
        trouble = "" if address else "does not resolve"
        if address and several_hosts and peer["on_cpu"] and _is_loopback(address):
            trouble = f"resolves to {address}, which other hosts cannot reach,"
        if trouble:
            raise InputError(
                f"process {i} runs on {name}, which {trouble} there: give {name} the address of "
                "its network in /etc/hosts of that host"
            )


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
