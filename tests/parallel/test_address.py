import socket

import pytest

from inl_jax.config import InputError
from inl_jax.parallel.address import (
    check_free,
    is_of_this_host,
    spell,
    split,
    trouble_reaching,
)


def test_split_undoes_spell():
    for host in ("host-0", "10.0.0.1", "fd00::1", "inl-0.inl.default.svc"):
        assert split(spell(host, 8476)) == (host, 8476)


@pytest.mark.parametrize(
    ("address", "advice"),
    [
        ("::1:8854", r"write an IPv6 address in brackets, \[::1\]:8854"),
        ("fd00::2", r"write an IPv6 address in brackets and a port, \[fd00::2\]:8476"),
        ("host", "must be host:port"),
        ("http://host:80", "must be host:port"),
        ("host:0", "a port from 1 to 65535"),
        ("host:65536", "a port from 1 to 65535"),
        ("host:", "must be host:port"),
        ("ho st:1", "must be host:port"),
    ],
)
def test_split_says_how_an_address_is_written(address, advice):
    with pytest.raises(InputError, match=advice) as refused:
        split(address)
    if "[" in advice:
        split(str(refused.value).rpartition(" ")[2])  # the spelling that it advises


def test_trouble_tells_an_unknown_name_from_a_closed_port_and_from_none():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert trouble_reaching(f"127.0.0.1:{port}") == ""
        with pytest.raises(OSError):
            check_free(f"127.0.0.1:{port}")
    assert trouble_reaching(f"127.0.0.1:{port}") == f"nothing listens on port {port} of 127.0.0.1"
    assert "no-such-host.invalid does not resolve" in trouble_reaching("no-such-host.invalid:1")
    check_free(f"127.0.0.1:{port}")


def test_trouble_tells_silence_and_a_missing_route(monkeypatch):
    for error, trouble in (
        (TimeoutError(), "no answer from port 5 of 127.0.0.1"),
        (OSError(101, "Network is unreachable"), "no way to 127.0.0.1 (Network is unreachable)"),
    ):

        def fail(*args, error=error, **fields):
            raise error

        monkeypatch.setattr(socket, "create_connection", fail)
        assert trouble in trouble_reaching("127.0.0.1:5")


def test_address_of_another_host_is_told_from_our_own():
    assert is_of_this_host("127.0.0.1:1") and not is_of_this_host("192.0.2.1:1")
