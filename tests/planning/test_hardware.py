import re
from dataclasses import asdict

import pytest

from inl_jax.config import InputError
from inl_jax.planning.hardware import GPUS, XLA_H100, find_gpu, gpu_of


def test_find_gpu_takes_a_whole_name_or_the_beginning_of_one():
    assert find_gpu("RTX4090").memory == 24564
    assert find_gpu("h200").name == "h200-141gb"
    assert find_gpu("h100").name == find_gpu("h100-80gb").name == "h100-80gb"
    assert find_gpu("h100-80gb-pcie").power == 350
    for gpu in GPUS:
        assert find_gpu(gpu.name) is gpu


@pytest.mark.parametrize(
    ("name", "choices"),
    [("tpu", "b200-180gb, h200-141gb, h100-80gb, "), ("a100", "a100-80gb, a100-40gb$")],
)
def test_find_gpu_names_the_choices(name, choices):
    with pytest.raises(InputError, match=f"^--device {name}: choose one of {choices}"):
        find_gpu(name)


def test_gpu_of_knows_what_jax_calls_each_gpu():
    assert gpu_of("NVIDIA H100 80GB HBM3").peak_flops == 989e12
    assert gpu_of("NVIDIA H100 PCIe").peak_flops == 756e12
    assert gpu_of("cpu") is None


def test_gpus_have_names_and_device_kinds_of_their_own():
    names = [gpu.name for gpu in GPUS]
    kinds = [kind for gpu in GPUS for kind in gpu.device_kinds]
    assert len(set(names)) == len(names) and len(set(kinds)) == len(kinds)
    assert all(name == name.lower() for name in names)


def test_gpus_hold_numbers_of_the_right_unit():
    """A wrong power of ten would go unseen in any one plan."""
    for gpu in GPUS:
        assert 8 * 2**10 < gpu.memory < 512 * 2**10, asdict(gpu)  # MiB
        assert 1e11 < gpu.memory_bandwidth < 1e13 and 1e10 < gpu.link < 1e12, asdict(gpu)
        assert 100 < gpu.power < 2000, asdict(gpu)
        assert gpu.peak_flops is None or 1e13 < gpu.peak_flops < 1e16, asdict(gpu)
        assert gpu.network is None or gpu.network < gpu.link, asdict(gpu)
        assert (gpu.price is None) == (gpu.price_source == ""), asdict(gpu)


def test_h100_of_xla_is_the_h100_of_the_table():
    described, gpu = dict(re.findall(r'(\w+): (\d+|".*?")', XLA_H100)), find_gpu("h100-80gb")
    assert described["device_description_str"].strip('"') in gpu.device_kinds
    assert int(described["memory_bandwidth"]) == pytest.approx(gpu.memory_bandwidth, rel=1e-3)
    assert int(described["device_memory_size"]) / 2**20 == pytest.approx(gpu.memory, rel=0.01)
