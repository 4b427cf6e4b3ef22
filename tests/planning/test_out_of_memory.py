import jax
import pytest

from inl_jax.config_file import override
from inl_jax.failures import OutOfMemory
from inl_jax.planning.memory import memory_needed
from inl_jax.planning.out_of_memory import explained
from inl_jax.planning.preflight import make_plan


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no room"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"),
        RuntimeError("std::bad_alloc"),
    ],
    ids=["host", "device", "C++"],
)
def test_error_for_want_of_memory_names_the_parts_and_a_change_that_needs_less(train_config, error):
    config = train_config(batch_size=64)
    with pytest.raises(OutOfMemory) as raised, explained(config, plan := make_plan(config)):
        raise error
    line = str(raised.value)
    assert "\n" not in line and f"ran out of memory ({str(error).splitlines()[0]})" in line
    assert "(parameters 47.38 KiB, moments 94.76 KiB, gradients 47.38 KiB, activations (est" in line
    flags = line.split(": add ")[1].split()
    smaller = make_plan(override(config, flags))
    assert memory_needed(*smaller).device_bytes < 0.9 * memory_needed(*plan).device_bytes


def test_other_errors_stay_as_they_are(train_config):
    config = train_config()
    for error in (jax.errors.JaxRuntimeError("INTERNAL: no"), ValueError("RESOURCE_EXHAUSTED")):
        with pytest.raises(type(error)) as raised, explained(config, make_plan(config)):
            raise error
        assert raised.value is error
