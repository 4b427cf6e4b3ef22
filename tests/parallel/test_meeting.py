import json
import socket

import pytest

from inl_jax.config import InputError
from inl_jax.parallel.launch import Launch
from inl_jax.parallel.meeting import check_address, check_peers, describe_self, what_is_awaited


def peer(**changes):
    mine = json.loads(describe_self(2)) | {"host": ["a", "10.0.0.1"], "on_cpu": True}
    mine["versions"] |= changes.pop("versions", {})
    return json.dumps(mine | changes)


def test_peers_alike_may_train_together():
    check_peers([peer(), peer(host=["b", "10.0.0.2"])])
    check_peers([peer(host=["a", "127.0.1.1"])] * 2)  # on one host
    on_gpus = dict(host=["a", "127.0.1.1"], on_cpu=False)
    check_peers([peer(**on_gpus), peer(host=["b", "10.0.0.2"])])


def test_process_that_expects_more_than_joined_is_refused():
    with pytest.raises(InputError, match="process 1 has num_processes=3, and 2 joined"):
        check_peers([peer(), peer(num_processes=3)])


@pytest.mark.parametrize("what", ["python", "jax", "flax", "orbax-checkpoint", "source of inl_jax"])
def test_peers_with_other_versions_are_refused_with_both_named(what):
    mine = json.loads(describe_self(2))["versions"][what]
    with pytest.raises(InputError) as refused:
        check_peers([peer(), peer(versions={what: "9.9"})])
    assert f"process 1 has {what} 9.9, and process 0 has {what} {mine}: install" in str(
        refused.value
    )


@pytest.mark.parametrize(
    ("host", "trouble"),
    [(["b", ""], "does not resolve"), (["b", "127.0.1.1"], "resolves to 127.0.1.1, which other")],
)
def test_host_that_the_others_cannot_reach_by_its_own_name_is_refused(host, trouble):
    with pytest.raises(InputError, match=f"process 1 runs on b, which {trouble}"):
        check_peers([peer(), peer(host=host)])


def test_port_of_a_launcher_that_is_taken_names_the_ways_out():
    with socket.create_server(("", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(InputError, match=f"{where}: process 0 cannot listen .* in use") as said:
            check_address(Launch(where, 2, 0, (), "Slurm"))
        assert "JAX_COORDINATOR_PORT" in str(said.value) and "--coordinator" in str(said.value)
        check_address(Launch(where, 2, 1, (), "Slurm"))  # only process 0 listens


def test_check_address_says_what_is_odd_at_once(said):
    check_address(Launch("no-such-host.invalid:8476", 2, 1))
    check_address(Launch("192.0.2.1:8476", 2, 0))
    assert "no-such-host.invalid does not resolve" in said[0]
    assert "192.0.2.1:8476: no address of this host" in said[1] and len(said) == 2


def test_what_is_awaited_names_the_address_and_how_many():
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = f"127.0.0.1:{server.getsockname()[1]}"
        assert what_is_awaited(Launch(where, 3, 0)) == (
            f"process 0 waits at {where} for 2 other processes of 3 to join"
        )
        assert what_is_awaited(Launch(where, 3, 2)).startswith("process 2 of 3 has reached")
    assert "waits for process 0 at" in (line := what_is_awaited(Launch(where, 3, 2)))
    assert "nothing listens" in line
