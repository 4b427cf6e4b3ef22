import pytest

from inl_jax.model.platform.device import H100, Device, made_for
from inl_jax.model.platform.unroll import unrolled


@pytest.mark.parametrize("device, pays", [(H100, True), (Device("cpu"), False)])
def test_unrolled_is_what_pays_on_the_device_unless_one_is_named(model_config, device, pays):
    with made_for(device):
        assert unrolled(model_config()) == pays
        assert not unrolled(model_config(unroll="none"))
        assert unrolled(model_config(unroll="iterations"))
