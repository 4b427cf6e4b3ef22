import jax
import numpy as np
import pytest

from inl_jax.model.language_model import hidden_states, init_params
from inl_jax.model.layers import compute_dtype
from inl_jax.model.losses import mean_loss
from inl_jax.model.platform.device import H100, Device, current_device, made_for


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


@pytest.mark.slow
def test_loss_and_gradient_do_not_depend_on_what_is_chosen_by_device(model_config):
    """A run that is resumed on another kind of device: loops, padding and chunks differ."""
    config = model_config(compute_dtype="float32", remat="auto", vocab_size=301)
    params = init_params(config, jax.random.key(0))
    ids_BS = jax.random.randint(jax.random.key(1), (4, 33), 0, config.vocab_size)

    def loss(params):
        hidden_BSD = hidden_states(config, params, ids_BS[:, :-1])
        return mean_loss(params, hidden_BSD, ids_BS[:, 1:])

    found = []
    for device in (Device("cpu"), H100):
        with made_for(device):
            found.append(jax.jit(jax.value_and_grad(loss))(params))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        assert np.linalg.norm(a - b) <= 2e-6 * np.linalg.norm(b)
