import pytest
from test_memory import needed_by

from inl_jax.config import with_fields
from inl_jax.config_file import load_config
from inl_jax.parallel.sharding import make_mesh
from inl_jax.planning.hardware import find_gpu
from inl_jax.planning.memory_advice import as_flags, smallest_change


def test_smallest_change_fits_and_holds_nothing_that_is_not_needed(train_config):
    config = train_config(
        model={"param_dtype": "bfloat16", "d_model": 64, "num_layers": 8}, batch_size=8
    )
    mesh = make_mesh(config.mesh)
    needed = needed_by(config).device_bytes
    found = []
    for share in (0.9, 0.55, 0.3):
        change = smallest_change(config, mesh, share * needed)
        found.append(change)
        assert needed_by(with_fields(config, change)).device_bytes <= share * needed
        # None of its fields could be left out.
        for name in change:
            fewer = {other: value for other, value in change.items() if other != name}
            assert needed_by(with_fields(config, fewer)).device_bytes > share * needed
    assert found[0] == {"accumulate_steps": 8}
    assert as_flags(found[0]) == "--accumulate_steps 8"
    assert len(found[2]) >= len(found[1])
    assert smallest_change(config, mesh, 0) is None


@pytest.mark.parametrize(
    ("name", "gpu", "tensor", "seq_len"),
    # On a tensor axis each device has all rows of a micro-batch, and some changes cost memory.
    [("3b", "rtx4090", 1, 4096), ("4b", "rtx4060ti-16gb", 2, 16384)],
)
def test_smallest_change_makes_a_large_model_fit_a_small_card(name, gpu, tensor, seq_len):
    fields = {
        "model.max_seq_len": seq_len,
        "data.seq_len": seq_len,
        "model.compute_dtype": "bfloat16",
        "mesh.data": 1,
        "mesh.tensor": tensor,
    }
    config, usable = with_fields(load_config(name), fields), find_gpu(gpu).usable_memory
    mesh = make_mesh(config.mesh)
    assert needed_by(config).device_bytes > usable
    changed = with_fields(config, smallest_change(config, mesh, usable))
    assert needed_by(changed, mesh.devices.ravel().tolist()).device_bytes <= usable
