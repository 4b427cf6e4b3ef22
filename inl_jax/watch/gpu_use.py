"""How busy, full and warm the GPUs are, and the energy they use, read by NVML."""

import collections
import importlib
import os
import threading
import time
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax

from inl_jax.console import first_line, say

SECONDS = 1  # between two readings


class Reading(NamedTuple):
    """The GPUs of this process at one moment."""

    util: float  # share of the time in which a kernel ran; mean over the GPUs
    memory: float  # bytes in use on the fullest GPU, by all programs
    temperature: float  # of the warmest GPU, in degrees Celsius
    watts: float  # of all GPUs together
    kwh: float | None  # of all GPUs together since the driver was loaded; None: not counted


class GpuUse:
    """Reads the GPUs of this process once a second, in a thread of its own.

    Training is never delayed, and a failure of NVML costs one line. Each process sees its own GPUs
    alone: the records of a run on several hosts hold those of process 0.
    """

    def __init__(self, devices: Iterable[jax.Device], *, energy_kwh: float = 0.0):
        """Starts reading, if there are GPUs.

        Args:
          devices: the local devices that train.
          energy_kwh: energy used by earlier starts of the run.
        """
        self._readings: collections.deque[Reading] = collections.deque(maxlen=3600)
        self._latest: Reading | None = None
        self._energy_kwh = energy_kwh
        self._closed = threading.Event()
        ordinals = [device.local_hardware_id for device in devices if device.platform == "gpu"]
        if ordinals:
            threading.Thread(target=self._watch, args=(ordinals,), daemon=True).start()

    def record(self) -> dict[str, float]:
        """Means since the last call, and the energy of the run so far; `{}` if nothing was read.

        `gpu_util` (share), `gpu_memory` (bytes on the fullest GPU), `gpu_temperature` (degrees
        Celsius, the warmest), `gpu_watts` (sum over the GPUs), `energy_kwh` (likewise).
        """
        if self._latest is None:
            return {}
        readings = list(self._readings) or [self._latest]
        self._readings.clear()
        util, memory, temperature, watts = (
            sum(values) / len(readings) for values in list(zip(*readings, strict=True))[:4]
        )
        return {
            "gpu_util": util,
            "gpu_memory": memory,
            "gpu_temperature": temperature,
            "gpu_watts": watts,
            "energy_kwh": self._energy_kwh,
        }

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()

    def _watch(self, ordinals: Sequence[int]) -> None:
        try:
            nvml = importlib.import_module("pynvml")
            nvml.nvmlInit()
            gpus = [_handle(nvml, ordinal) for ordinal in ordinals]
            moment = time.monotonic()
            while True:
                reading, now = _read(nvml, gpus), time.monotonic()
                if self._latest is not None:
                    used = reading.watts * (now - moment) / 3.6e6
                    if reading.kwh is not None:
                        used = reading.kwh - self._latest.kwh
                    self._energy_kwh += used
                self._latest, moment = reading, now
                self._readings.append(reading)
                if self._closed.wait(SECONDS):
                    return
        except ImportError:
            say("GPU use is not recorded: pip install 'inl_jax[gpu]'")
        except Exception as error:  # NVML has many; none may end a run
            self._latest = None
            say(f"WARNING: GPU use is no longer recorded: NVML: {first_line(error)}")


def _handle(nvml: ModuleType, ordinal: int) -> Any:
    """The GPU that CUDA counts as `ordinal` among the visible ones.

    Numbers in CUDA_VISIBLE_DEVICES are taken as NVML's, in order of the PCI bus. CUDA agrees where
    the GPUs are of one kind, or with CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    name = visible.split(",")[ordinal].strip() if visible else str(ordinal)
    if name.isdigit():
        return nvml.nvmlDeviceGetHandleByIndex(int(name))
    return nvml.nvmlDeviceGetHandleByUUID(name)


def _read(nvml: ModuleType, gpus: Sequence[Any]) -> Reading:
    try:
        millijoules = [nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) for gpu in gpus]
    except nvml.NVMLError:  # before Volta
        millijoules = None
    return Reading(
        util=sum(nvml.nvmlDeviceGetUtilizationRates(gpu).gpu for gpu in gpus) / 100 / len(gpus),
        memory=max(nvml.nvmlDeviceGetMemoryInfo(gpu).used for gpu in gpus),
        temperature=max(
            nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU) for gpu in gpus
        ),
        watts=sum(nvml.nvmlDeviceGetPowerUsage(gpu) for gpu in gpus) / 1000,
        kwh=None if millijoules is None else sum(millijoules) / 3.6e9,
    )


def peak_memory(devices: Iterable[jax.Device]) -> dict[str, int]:
    """`peak_memory`: bytes of the fullest local device at its peak; `{}` where JAX does not know.

    JAX counts what its arrays and programs take, not what it has reserved, since the process began.
    """
    stats = [device.memory_stats() or {} for device in devices]
    peaks = [found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found]
    return {"peak_memory": max(peaks)} if peaks else {}
