import numpy as np
import pytest

from inl_jax.config import InputError
from inl_jax.interop.torch_file import read_state_dict

torch = pytest.importorskip("torch", reason="the torch extra is not installed")


def test_read_state_dict_gives_float_arrays_also_from_a_training_state(tmp_path):
    weights = {"a": torch.ones(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    for saved in (weights, {"model_state_dict": weights, "epoch": 3}):
        torch.save(saved, tmp_path / "w.pt")
        found = read_state_dict(tmp_path / "w.pt")
        assert {name: value.shape for name, value in found.items()} == {"a": (2, 3), "b": (2,)}
        assert all(value.dtype == np.float32 for value in found.values())


@pytest.mark.parametrize("saved", [[1, 2], {"epoch": 3}], ids=["list", "no tensors"])
def test_read_state_dict_names_a_file_that_holds_something_else(tmp_path, saved):
    torch.save(saved, tmp_path / "w.pt")
    with pytest.raises(InputError, match="w.pt: not a state_dict"):
        read_state_dict(tmp_path / "w.pt")


def test_read_state_dict_runs_no_code_from_the_file(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"a": Trap()}, tmp_path / "w.pt")
    with pytest.raises(InputError, match="without running code from it"):
        read_state_dict(tmp_path / "w.pt")
    assert not (tmp_path / "sprung").exists()
