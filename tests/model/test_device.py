import jax

from inl_jax.model.device import H100, Device, current_device, made_for
from inl_jax.model.layers import compute_dtype


def test_current_device_is_the_one_of_jax_unless_another_is_named():
    here = current_device()
    assert here.platform == jax.default_backend()
    with made_for(H100):
        assert current_device() == H100
        with made_for(Device("cpu")), made_for(None):
            assert current_device() == Device("cpu")
        assert current_device() == H100
    assert current_device() == here


def test_compute_dtype_is_that_of_the_device_the_model_is_made_for(model_config):
    for device, dtype in ((Device("cpu"), "float32"), (H100, "bfloat16")):
        with made_for(device):
            assert compute_dtype(model_config()) == dtype
