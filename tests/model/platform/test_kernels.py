import pytest

from inl_jax.model.platform.device import H100, Device, made_for
from inl_jax.model.platform.kernels import with_kernels_found_here

CPU, A100 = Device("cpu"), Device("gpu", (8, 0))
FITS = {"context": "attention", "d_model": 64, "controller_width": 64, "compute_dtype": "bfloat16"}
ASKED = {"attention_kernel": "cudnn", "integrator_kernel": "mosaic"}


@pytest.mark.parametrize(
    ("device", "fields", "missing"),
    [
        (H100, {}, []),
        (A100, {}, ["integrator_kernel"]),
        (CPU, {}, ["attention_kernel", "integrator_kernel"]),
        (CPU, {"context": "decay"}, ["integrator_kernel"]),  # which has no attention
        (CPU, {"context": "gated", "attention_every": 2}, [*ASKED]),
        (CPU, {name: "auto" for name in ASKED}, []),
        # auto is refused in training, so that nobody trains slowly unawares.
        (H100, {"compute_dtype": "float32", "attention_kernel": "auto"}, [*ASKED]),
    ],
)
def test_trained_model_takes_xla_for_kernels_that_are_missing_and_says_so(
    model_config, said, device, fields, missing
):
    config = model_config(**FITS | ASKED | fields)
    with made_for(device):
        found = with_kernels_found_here(config)
    assert found == model_config(**FITS | ASKED | fields | dict.fromkeys(missing, "xla"))
    assert [line.partition("=")[0].removeprefix("model.") for line in said] == missing
