import numpy as np
import pytest

from inl_jax.config import InputError
from inl_jax.interop.torch_file import read_state_dict

torch = pytest.importorskip("torch", reason="the torch extra is not installed")

PLAIN = {
    "token_embedding.weight": torch.ones(2, 3),
    "layers.0.norm1.bias": torch.ones(2, dtype=torch.bfloat16),
}


def prefixed(prefix):
    return {prefix + name: value for name, value in PLAIN.items()}


def wrapped_within(wrapper):
    return {name.replace("0.", f"0.{wrapper}."): value for name, value in PLAIN.items()}


@pytest.fixture
def read(tmp_path):
    """Saves something as w.pt and reads it."""

    def read(saved):
        torch.save(saved, tmp_path / "w.pt")
        return read_state_dict(tmp_path / "w.pt")

    return read


def test_read_state_dict_gives_float_arrays_and_says_nothing_of_plain_weights(read, said):
    found = read(PLAIN)
    assert {name: value.shape for name, value in found.items()} == {
        "token_embedding.weight": (2, 3),
        "layers.0.norm1.bias": (2,),
    }
    assert all(value.dtype == np.float32 for value in found.values())
    assert not said


@pytest.mark.parametrize(
    "saved, line",
    [
        ({"model_state_dict": PLAIN, "epoch": 3}, "['model_state_dict']"),
        ({"state_dict": prefixed("model."), "epoch": 3}, "['state_dict'], each named without 'mod"),
        ({"a": {"b": PLAIN}, "optimizer": {"state": {0: {"step": 1}}}}, "['a']['b']"),
        (prefixed("_orig_mod."), "'_orig_mod.'"),
        (prefixed("module."), "'module.'"),
        (prefixed("_orig_mod.module."), "'_orig_mod.module.'"),
        (prefixed("module._orig_mod.") | {"n_averaged": torch.tensor(3)}, "not read: 'n_averaged'"),
        (wrapped_within("_orig_mod") | {"epoch": 3}, "not read: 'epoch'"),
        (wrapped_within("_fsdp_wrapped_module") | {0: torch.ones(1)}, "not read: 0"),
    ],
)
def test_weights_are_found_behind_what_wraps_them_and_a_line_says_so(read, said, saved, line):
    found = read(saved)
    assert set(found) == set(PLAIN)
    assert line in said[0] and "w.pt: 2 weights" in said[0]


@pytest.mark.parametrize(
    "saved, message",
    [
        ([1, 2], "not a state_dict.*holds list"),
        ({"epoch": 3}, "not a state_dict.*holds 'epoch'"),
        ({0: PLAIN["token_embedding.weight"]}, "not a state_dict"),
        ({"token_embedding.weight": [1.0, 2.0]}, "not a state_dict"),
        ({"model": PLAIN, "ema": PLAIN}, r"several models \(\['model'\].*, \['ema'\]"),
        (prefixed("model.") | prefixed("ema."), "several models"),
        ({"token_embedding.weight": torch.eye(3).to_sparse()}, "no plain tensor"),
        ({"token_embedding.weight": torch.empty(3, 3, device="meta")}, "no plain tensor"),
    ],
)
def test_read_state_dict_names_a_file_that_holds_something_else(read, saved, message):
    with pytest.raises(InputError, match=f"w.pt: .*{message}") as caught:
        read(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch: these tensors are deprecated
def test_quantized_weights_are_refused(read):
    quantized = torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8)
    with pytest.raises(InputError, match="no plain tensor"):
        read({"token_embedding.weight": quantized})


def test_read_state_dict_tells_a_missing_file_from_a_damaged_one(tmp_path):
    torch.save(PLAIN, tmp_path / "w.pt")
    (tmp_path / "short.pt").write_bytes((tmp_path / "w.pt").read_bytes()[:-100])
    (tmp_path / "empty.pt").touch()
    for name, message in (
        ("missing.pt", "no such file"),
        (".", "no such file"),
        ("short.pt", "copy it again if it is damaged"),
        ("empty.pt", "copy it again if it is damaged"),
    ):
        with pytest.raises(InputError, match=message):
            read_state_dict(tmp_path / name)


def test_read_state_dict_runs_no_code_from_the_file(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"a": Trap()}, tmp_path / "w.pt")
    with pytest.raises(InputError, match="without running code from it"):
        read_state_dict(tmp_path / "w.pt")
    assert not (tmp_path / "sprung").exists()
