import pytest

from inl_jax.model.device import H100, Device, made_for
from inl_jax.model.unroll import MOST_LAYERS, unrolled


@pytest.mark.parametrize("device, loop", [(H100, "iterations"), (Device("cpu"), "layers")])
def test_unrolled_is_the_loop_that_pays_on_the_device_unless_one_is_named(
    model_config, device, loop
):
    with made_for(device):
        assert unrolled(model_config()) == loop
        assert unrolled(model_config(unroll="none")) == "none"


def test_unrolled_leaves_many_layers_and_recomputed_ones_in_a_loop_on_a_cpu(model_config):
    with made_for(Device("cpu")):
        assert unrolled(model_config(num_layers=MOST_LAYERS)) == "layers"
        assert unrolled(model_config(num_layers=MOST_LAYERS + 1)) == "none"
        assert unrolled(model_config(remat="block")) == "none"
