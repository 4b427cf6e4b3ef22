"""Addresses of process 0, host:port: how they are written, and what stands in their way."""

import contextlib
import ipaddress
import os
import re
import socket

from inl_jax.config import InputError

_SECONDS = 3  # for an answer


def spell(host: str, port: int | str) -> str:
    """`host:port`; an IPv6 address gets brackets."""
    return f"[{host}]:{port}" if _is_ipv6(host) else f"{host}:{port}"


def split(address: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[IPv6]:port`.

    Raises:
      InputError: it is spelled in another way.
    """
    found = re.fullmatch(r"(?:\[([^\[\]\s/]+)\]|([^\[\]\s/:]+)):(\d+)", address)
    if found and 0 < int(found[3]) < 2**16:
        return found[1] or found[2], int(found[3])
    host, _, port = address.rpartition(":")
    if _is_ipv6(host) and port.isdecimal():
        advice = f"write an IPv6 address in brackets, [{host}]:{port}"
    elif _is_ipv6(address):
        advice = f"write an IPv6 address in brackets and a port, [{address}]:8476"
    else:
        advice = "must be host:port of process 0, with a port from 1 to 65535"
    raise InputError(f"coordinator={address}: {advice}")


def _is_ipv6(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).version == 6
    return False


def check_free(address: str) -> None:
    """Raises `OSError` if process 0 cannot listen on its port: JAX would crash."""
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS")
    host, port = split(bind) if bind else ("", split(address)[1])
    ipv6 = _is_ipv6(host) or (not host and socket.has_dualstack_ipv6())
    family = socket.AF_INET6 if ipv6 else socket.AF_INET
    socket.create_server((host, port), family=family, dualstack_ipv6=ipv6 and not host).close()


def trouble_resolving(address: str) -> str:
    """Why the name of the host does not resolve; empty if it does."""
    host, port = split(address)
    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        return f"{host} does not resolve ({error.strerror})"
    return ""


def trouble_reaching(address: str) -> str:
    """Why nothing can be reached there; empty if something listens."""
    host, port = split(address)
    if trouble := trouble_resolving(address):
        return trouble
    try:
        socket.create_connection((host, port), timeout=_SECONDS).close()
    except ConnectionRefusedError:
        return f"nothing listens on port {port} of {host}"
    except TimeoutError:
        return f"no answer from port {port} of {host}: a firewall, or another host's address"
    except OSError as error:
        return f"no way to {host} ({error.strerror})"
    return ""


def is_of_this_host(address: str) -> bool:
    """Whether the name, if it resolves, is one of this host."""
    host, _ = split(address)
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError:
        return True
    for family, kind, _, _, where in found:
        with contextlib.suppress(OSError), socket.socket(family, kind) as trial:
            trial.bind(where)
            return True
    return False
