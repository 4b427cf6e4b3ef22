import pytest

from inl_jax.model.device import H100, Device, made_for
from inl_jax.model.unroll import unrolled


@pytest.mark.parametrize("device, loop", [(H100, "iterations"), (Device("cpu"), "none")])
def test_unrolled_is_the_loop_that_pays_on_the_device_unless_one_is_named(
    model_config, device, loop
):
    with made_for(device):
        assert unrolled(model_config()) == loop
        assert unrolled(model_config(unroll="none")) == "none"
