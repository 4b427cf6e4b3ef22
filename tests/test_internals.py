import functools
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from inl_jax import internals
from inl_jax.config import InputError

ROOT = Path(__file__).parents[1]


def printed(code):
    """What a new process prints that runs `code`."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_internals_import_neither_jax_nor_orbax():
    code = f"""
import sys, types
sys.modules["inl_jax"] = types.ModuleType("inl_jax")  # without the package's own imports
sys.modules["inl_jax"].__path__ = [{str(ROOT / "inl_jax")!r}]
import inl_jax.internals
print([name for name in ("jax", "jaxlib", "orbax") if name in sys.modules])
"""
    assert printed(code) == "[]"


def test_distributed_state_of_one_process_has_no_store():
    state = internals.distributed_state()
    assert (state.process_id, state.num_processes, state.client) == (0, 1, None)


def test_distributed_state_names_what_this_jax_lacks(monkeypatch):
    monkeypatch.delattr("jax._src.distributed.global_state")
    gone = f"jax {re.escape(jax.__version__)} has no jax._src.distributed.global_state: install "
    with pytest.raises(InputError, match=gone + ".* or train with one process"):
        internals.distributed_state()


def test_backends_are_initialized_does_not_start_them():
    code = """
import jax
from inl_jax.internals import backends_are_initialized as ask
print(ask(), ask(), len(jax.devices()) > 0 and ask())
"""
    assert printed(code) == "False False True"


def test_backends_are_initialized_is_false_without_its_private_name(monkeypatch):
    assert jax.devices() and internals.backends_are_initialized()
    monkeypatch.delattr("jax._src.xla_bridge.backends_are_initialized")
    assert not internals.backends_are_initialized()


def compile_for_cpus(traced, num_devices):
    return internals.compile_for_topology(
        traced,
        platform="cpu",
        topology=f"1x1x{num_devices}",
        target_config="one core",
        num_devices=num_devices,
        options={"xla_embed_ir_in_executable": True},
    )


@pytest.mark.parametrize("num_devices", [1, 2])
def test_compile_for_topology_partitions_over_the_described_devices(monkeypatch, num_devices):
    """JAX describes no CPUs, so this process's own devices and their compiler stand for them."""
    devices = jax.devices()[:num_devices]

    def describe(**fields):
        assert fields == {
            "platform": "cpu",
            "topology_name": "",
            "topology": f"1x1x{num_devices}",
            "target_config": "one core",
        }
        return SimpleNamespace(devices=devices)

    def compile_and_note(client, module, described, options):
        given.append(options)
        assert list(described) == devices
        return client.compile_and_load(module, described, options)

    given = []
    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", describe)
    monkeypatch.setattr(type(devices[0].client), "compile", compile_and_note)
    sharded = jax.NamedSharding(jax.sharding.Mesh(devices, "x"), jax.P("x"))
    x = jax.ShapeDtypeStruct((8,), "float32", sharding=sharded)
    traced = jax.jit(lambda x: x.sum()).trace(x)
    (module,) = compile_for_cpus(traced, num_devices).hlo_modules()
    (options,) = given
    assert options.env_option_overrides == [("xla_embed_ir_in_executable", True)]
    assert options.executable_build_options.use_spmd_partitioning == (num_devices > 1)
    assert options.executable_build_options.use_shardy_partitioner
    assert options.num_partitions == options.executable_build_options.num_partitions == num_devices
    assert ("all-reduce" in module.to_string()) == (num_devices > 1)


@pytest.mark.parametrize(
    "name",
    [
        "jax.experimental.topologies.get_topology_desc",
        "jax.extend.backend.get_compile_options",
        "jaxlib.xla_client.DeviceList",
    ],
)
def test_compile_for_topology_names_what_this_jax_lacks(monkeypatch, name):
    monkeypatch.delattr(name)
    with pytest.raises(InputError, match=f"has no {name}: install .* or compile for the CPU"):
        compile_for_cpus(None, 1)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_cudnn_assumed_lets_cudnn_attention_be_traced_without_a_gpu(capability):
    tokens = capability[0]  # JAX remembers what it has traced
    wide = jax.ShapeDtypeStruct((1, tokens, 2, 256), "bfloat16")  # heads that only a Hopper takes
    attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    with internals.cudnn_assumed(90700, capability):
        if capability == (9, 0):
            assert jax.eval_shape(attend, wide, wide, wide).shape == wide.shape
        else:
            with pytest.raises(NotImplementedError, match="head dim must be <= 128"):
                jax.eval_shape(attend, wide, wide, wide)


def test_cudnn_assumed_gives_jax_its_own_answers_back():
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    before = cudnn.check_cudnn_version, cudnn.check_compute_capability
    with pytest.raises(KeyError), internals.cudnn_assumed(90700, (9, 0)):
        assert cudnn.check_cudnn_version() == 90700
        raise KeyError
    assert (cudnn.check_cudnn_version, cudnn.check_compute_capability) == before


@pytest.fixture
def checkpointer(tmp_path):
    every = ocp.training.save_decision_policies.FixedIntervalPolicy(1)
    made = ocp.training.Checkpointer(tmp_path, save_decision_policy=every)
    yield made
    made.close()


def save_with_a_full_disk(checkpointer):
    """Saves 400 kB while no file can pass 100 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        array = np.random.default_rng(0).normal(size=50_000)
        checkpointer.save_checkpointables_async(1, {"params": {"w": jax.numpy.asarray(array)}})
        with pytest.raises(Exception, match="File too large"):
            checkpointer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_on_save_failure_calls_back_with_the_error_and_only_then(checkpointer):
    told = []
    internals.on_save_failure(checkpointer, told.append)
    try:
        raise OSError("unrelated, and still being handled while the next save starts")
    except OSError:
        checkpointer.save_checkpointables_async(0, {"params": {"w": jax.numpy.ones(3)}})
    checkpointer.wait()
    assert told == []
    save_with_a_full_disk(checkpointer)
    (error,) = told
    assert "File too large" in str(error)


@pytest.mark.parametrize("name", ["_manager", "_save_progress_tracker"])
def test_on_save_failure_warns_if_this_orbax_cannot_tell(checkpointer, said, monkeypatch, name):
    owner = checkpointer if name == "_manager" else checkpointer._manager
    with monkeypatch.context() as without:
        without.delattr(owner, name)
        internals.on_save_failure(checkpointer, pytest.fail)
    (warning,) = said
    assert warning.startswith("WARNING: orbax-checkpoint ") and "after 20 minutes" in warning
    save_with_a_full_disk(checkpointer)
