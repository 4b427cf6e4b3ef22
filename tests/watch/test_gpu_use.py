import sys
import time
from types import SimpleNamespace

import jax
import pytest

from inl_jax.watch import gpu_use
from inl_jax.watch.gpu_use import GpuUse, peak_memory


class Nvml(SimpleNamespace):
    """Two GPUs: A with 300 W, 80 degrees, 20 GB; B with 100 W, 40 degrees, 60 GB."""

    NVMLError = RuntimeError
    NVML_TEMPERATURE_GPU = 0
    counted = True  # energy; 3.6e9 mJ are one kWh, and each GPU uses it between two readings
    calls = 0

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByIndex(self, index):
        return "AB"[index]

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return {"GPU-a": "A", "GPU-b": "B"}[uuid]

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu):
        if not self.counted:
            raise self.NVMLError("Not Supported")
        self.calls += 1
        return 7e9 + 3.6e9 * self.calls

    def nvmlDeviceGetUtilizationRates(self, gpu):
        return SimpleNamespace(gpu={"A": 90, "B": 50}[gpu])

    def nvmlDeviceGetMemoryInfo(self, gpu):
        return SimpleNamespace(used={"A": 20e9, "B": 60e9}[gpu])

    def nvmlDeviceGetTemperature(self, gpu, sensor):
        return {"A": 80, "B": 40}[gpu]

    def nvmlDeviceGetPowerUsage(self, gpu):
        return {"A": 300_000, "B": 100_000}[gpu]


def devices(*ordinals):
    return [SimpleNamespace(platform="gpu", local_hardware_id=ordinal) for ordinal in ordinals]


@pytest.fixture
def nvml(monkeypatch):
    """The stub in NVML's place, read every few milliseconds."""
    stub = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", stub)
    monkeypatch.setattr(gpu_use, "SECONDS", 0.003)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return stub


def wait_for(read, done=bool):
    """The first value read that is `done`."""
    deadline = time.monotonic() + 10
    while not done(value := read()) and time.monotonic() < deadline:
        time.sleep(0.001)
    return value


def record(use, done=bool):
    """The first record that is `done`; reading stops then."""
    found = wait_for(use.record, done)
    use.close()
    return found


def test_gpu_use_reads_the_gpus_of_this_process(nvml):
    found = record(GpuUse(devices(0, 1)))
    assert found.pop("energy_kwh") >= 0
    assert found == {
        "gpu_util": pytest.approx(0.7),
        "gpu_memory": 60e9,
        "gpu_temperature": 80,
        "gpu_watts": 400,
    }


@pytest.mark.parametrize(
    "visible, ordinal, watts", [("1,0", 0, 100), ("1", 0, 100), ("GPU-b,GPU-a", 1, 300)]
)
def test_gpu_use_counts_among_the_visible_gpus(nvml, monkeypatch, visible, ordinal, watts):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert record(GpuUse(devices(ordinal)))["gpu_watts"] == watts


def test_gpu_use_adds_up_energy_from_the_counter(nvml):
    use = GpuUse(devices(0), energy_kwh=0.5)
    total = record(use, lambda found: found.get("energy_kwh", 0) >= 2.4)["energy_kwh"]
    assert total - 0.5 == pytest.approx(round(total - 0.5))  # one kWh a reading


def test_gpu_use_adds_up_watts_where_energy_is_not_counted(nvml):
    nvml.counted = False
    start = time.monotonic()
    use = GpuUse(devices(0), energy_kwh=0.5)
    total = record(use, lambda found: found.get("energy_kwh", 0) > 0.5)["energy_kwh"]
    assert 0 < total - 0.5 <= 300 * (time.monotonic() - start) / 3.6e6


def test_gpu_use_is_absent_without_gpus_or_nvml(monkeypatch, said):
    use = GpuUse(jax.local_devices())
    assert use.record() == {} and said == []
    monkeypatch.setitem(sys.modules, "pynvml", None)
    use = GpuUse(devices(0))
    assert wait_for(lambda: said)
    assert use.record() == {}
    assert said == ["GPU use is not recorded: pip install 'inl_jax[gpu]'"]


def test_gpu_use_ends_with_one_line_if_nvml_fails(nvml, said):
    use = GpuUse(devices(0))
    assert wait_for(use.record)

    def fail(gpu):
        raise nvml.NVMLError("GPU is lost")

    nvml.nvmlDeviceGetPowerUsage = fail
    assert wait_for(lambda: said)
    assert use.record() == {}
    assert said == ["WARNING: GPU use is no longer recorded: NVML: GPU is lost"]


def test_peak_memory_is_that_of_the_fullest_device():
    def device(stats):
        return SimpleNamespace(memory_stats=lambda: stats)

    full, fuller = ({"peak_bytes_in_use": peak} for peak in (5, 7))
    assert peak_memory([device(full), device(fuller), device({})]) == {"peak_memory": 7}
    assert peak_memory(jax.local_devices()) == {}
