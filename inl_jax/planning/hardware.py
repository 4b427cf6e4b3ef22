"""The one table of GPUs: speeds, sizes, power and prices, each with its source.

Everything that plans a run or judges its speed reads these numbers here. A number that no source
gives is None, never a guess.
"""

import dataclasses

from inl_jax.config import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """One model of GPU."""

    name: str
    """As users type it: lower case, form factor last."""
    device_kinds: tuple[str, ...] = ()
    """What JAX calls it (`jax.Device.device_kind`)."""
    capability: tuple[int, int]
    """CUDA compute capability, from NVIDIA's list (developer.nvidia.com/cuda-gpus)."""
    peak_flops: float | None
    """Dense matrix products of bfloat16 with float32 accumulation, FLOP/s, without sparsity."""
    memory: int
    """MiB, as nvidia-smi shows it."""
    memory_bandwidth: float
    """Bytes/s between the GPU and its own memory."""
    link: float
    """Bytes/s each way to the other GPUs of its node: NVLink if it has a switch, else PCIe."""
    network: float | None = None
    """Bytes/s each way to other nodes, per GPU of a DGX system; None if there is no such system."""
    power: float
    """Watts that the board may draw."""
    price: float | None = None
    """USD per hour to rent one."""
    price_source: str = ""
    """Who asked that price, and when."""

    @property
    def usable_memory(self) -> int:
        """Bytes that JAX may use at XLA_PYTHON_CLIENT_MEM_FRACTION=.95, less CUDA's context."""
        return int(0.92 * self.memory * 2**20)


GPUS_PER_NODE = 8  # in a DGX system

_GUIDE = "the published training guide (Vast.ai, RunPod and others), undated"
_RUNPOD = "the lowest at RunPod, as deploybase.ai quoted it on 2026-03-10"

# Speeds, links and watts are those of the NVIDIA data sheets named above each entry, most of them
# taken from pages that quote the sheets (2026-11). The sheets count NVLink and PCIe both ways
# together and matrix products with sparsity; both are halved here.
GPUS = (
    # HGX B200 and DGX B200 data sheets: NVLink 1.8 TB/s, eight 400 Gb/s adapters.
    Gpu(
        name="b200-180gb",
        device_kinds=("NVIDIA B200",),
        capability=(10, 0),
        peak_flops=2250e12,
        memory=183359,
        memory_bandwidth=8e12,
        link=900e9,
        network=50e9,
        power=1000,
        price=5.98,
        price_source=_RUNPOD,
    ),
    # H200 and DGX H200 data sheets: NVLink 900 GB/s, eight 400 Gb/s adapters.
    Gpu(
        name="h200-141gb",
        device_kinds=("NVIDIA H200",),
        capability=(9, 0),
        peak_flops=989e12,
        memory=143771,
        memory_bandwidth=4.8e12,
        link=450e9,
        network=50e9,
        power=700,
        price=3.59,
        price_source=_RUNPOD,
    ),
    # H100 (SXM) and DGX H100 data sheets: NVLink 900 GB/s, eight 400 Gb/s adapters.
    Gpu(
        name="h100-80gb",
        device_kinds=("NVIDIA H100 80GB HBM3",),
        capability=(9, 0),
        peak_flops=989e12,
        memory=81559,
        memory_bandwidth=3.35e12,
        link=450e9,
        network=50e9,
        power=700,
        price=2.69,
        price_source="RunPod Secure Cloud, as spheron.network quoted it on 2026-05-22",
    ),
    # H100 (PCIe) data sheet and product brief PB-11133: PCIe 5.0 x16, 128 GB/s.
    Gpu(
        name="h100-80gb-pcie",
        device_kinds=("NVIDIA H100 PCIe",),
        capability=(9, 0),
        peak_flops=756e12,
        memory=81559,
        memory_bandwidth=2e12,
        link=64e9,
        power=350,
        price=1.99,
        price_source=_RUNPOD,
    ),
    # A100 (SXM) and DGX A100 data sheets: NVLink 600 GB/s, eight 200 Gb/s adapters.
    Gpu(
        name="a100-80gb",
        device_kinds=("NVIDIA A100-SXM4-80GB",),
        capability=(8, 0),
        peak_flops=312e12,
        memory=81920,
        memory_bandwidth=2039e9,
        link=300e9,
        network=25e9,
        power=400,
        price=1.50,
        price_source=_GUIDE,
    ),
    # The same sheets, 40 GB.
    Gpu(
        name="a100-40gb",
        device_kinds=("NVIDIA A100-SXM4-40GB",),
        capability=(8, 0),
        peak_flops=312e12,
        memory=40960,
        memory_bandwidth=1555e9,
        link=300e9,
        network=25e9,
        power=400,
        price=1.00,
        price_source=_GUIDE,
    ),
    # A100 40GB PCIe product brief PB-10137: PCIe 4.0 x16, 64 GB/s.
    Gpu(
        name="a100-40gb-pcie",
        device_kinds=("NVIDIA A100-PCIE-40GB",),
        capability=(8, 0),
        peak_flops=312e12,
        memory=40960,
        memory_bandwidth=1555e9,
        link=32e9,
        power=250,
    ),
    # L40S data sheet: PCIe 4.0 x16, 64 GB/s.
    Gpu(
        name="l40s",
        device_kinds=("NVIDIA L40S",),
        capability=(8, 9),
        peak_flops=362e12,
        memory=46068,
        memory_bandwidth=864e9,
        link=32e9,
        power=350,
        price=0.79,
        price_source=_RUNPOD,
    ),
    # RTX 6000 Ada Generation data sheet, which gives no dense bfloat16 peak: PCIe 4.0 x16.
    Gpu(
        name="rtx6000-ada",
        device_kinds=("NVIDIA RTX 6000 Ada Generation",),
        capability=(8, 9),
        peak_flops=None,
        memory=49140,
        memory_bandwidth=960e9,
        link=32e9,
        power=300,
    ),
    # "NVIDIA RTX Blackwell GPU Architecture", appendix: PCIe 5.0 x16.
    Gpu(
        name="rtx5090",
        device_kinds=("NVIDIA GeForce RTX 5090",),
        capability=(12, 0),
        peak_flops=209.5e12,
        memory=32607,
        memory_bandwidth=1792e9,
        link=64e9,
        power=575,
        price=0.69,
        price_source=_RUNPOD,
    ),
    # "NVIDIA Ada GPU Architecture", appendix: PCIe 4.0 x16.
    Gpu(
        name="rtx4090",
        device_kinds=("NVIDIA GeForce RTX 4090",),
        capability=(8, 9),
        peak_flops=165e12,
        memory=24564,
        memory_bandwidth=1008e9,
        link=32e9,
        power=450,
        price=0.30,
        price_source=_GUIDE,
    ),
    # "NVIDIA Ampere GA102 GPU Architecture", appendix: PCIe 4.0 x16. (NVLink bridges pairs only.)
    Gpu(
        name="rtx3090",
        device_kinds=("NVIDIA GeForce RTX 3090",),
        capability=(8, 6),
        peak_flops=71e12,
        memory=24576,
        memory_bandwidth=936e9,
        link=32e9,
        power=350,
        price=0.22,
        price_source=_RUNPOD,
    ),
    # A10G data sheet (of NVIDIA for AWS): PCIe 4.0 x16, 64 GB/s.
    Gpu(
        name="a10g",
        device_kinds=("NVIDIA A10G",),
        capability=(8, 6),
        peak_flops=70e12,
        memory=23028,
        memory_bandwidth=600e9,
        link=32e9,
        power=300,
    ),
    # "NVIDIA Ada GPU Architecture", appendix: PCIe 4.0 x16.
    Gpu(
        name="rtx4080",
        device_kinds=("NVIDIA GeForce RTX 4080",),
        capability=(8, 9),
        peak_flops=97.5e12,
        memory=16376,
        memory_bandwidth=716.8e9,
        link=32e9,
        power=320,
    ),
    # NVIDIA's product page of the GeForce RTX 4060 family, which gives no dense bfloat16 peak:
    # PCIe 4.0 x8. The card of 8 GB has the same device kind.
    Gpu(
        name="rtx4060ti-16gb",
        device_kinds=("NVIDIA GeForce RTX 4060 Ti",),
        capability=(8, 9),
        peak_flops=None,
        memory=16380,
        memory_bandwidth=288e9,
        link=16e9,
        power=165,
    ),
)

# An H100 (SXM) as XLA describes it: what its CUDA compiler must know if it cannot ask a device.
XLA_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 patch: 0 } device_description_str: "NVIDIA H100 80GB HBM3"
"""
XLA_H100_CUDNN = 90700  # the same dnn_version_info, as cuDNN and JAX write it


def find_gpu(name: str, flag: str = "--device") -> Gpu:
    """The GPU of that name, or the only one whose name begins so.

    `h100` is the SXM module `h100-80gb`: a name that another match begins with hides the longer
    one.

    Raises:
      InputError: no GPU matches, or several do.
    """
    found = [gpu for gpu in GPUS if gpu.name.startswith(name.lower())]
    short = [g for g in found if not any(g.name.startswith(f"{other.name}-") for other in found)]
    if len(short) != 1:
        names = [gpu.name for gpu in short or GPUS]
        raise InputError(f"{flag} {name}: choose one of {', '.join(names)}")
    return short[0]


def gpu_of(device_kind: str) -> Gpu | None:
    """The GPU that JAX calls `device_kind`; None if the table lacks it, as it does CPUs."""
    return next((gpu for gpu in GPUS if device_kind in gpu.device_kinds), None)
