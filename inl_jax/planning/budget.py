"""Time, rent and energy of a run, from its arithmetic and the table of GPUs."""

import statistics
from pathlib import Path
from typing import Any, NamedTuple

from inl_jax.config import InputError, TrainConfig
from inl_jax.planning.cost import flops_per_token
from inl_jax.planning.hardware import Gpu
from inl_jax.training.metrics import read_metrics

ASSUMED_MFU = 0.1
"""Share of a GPU's peak where none is measured. The bytes that XLA's H100 program of the 3b moves
allow 15.8% at most, as predicted (docs/cost.md); programs do not reach such bounds."""

TOKENS_PER_PARAMETER = 20  # Hoffmann et al., "Training Compute-Optimal Large Language Models", 2022
_GUIDE_MINIMUM = ((2.3e9, 15e9), (1.5e9, 10e9))  # (parameters from, tokens): its 4B, its 3B


class Budget(NamedTuple):
    """What training costs on GPUs of one kind. None: the table lacks the peak or the price."""

    name: str  # of the GPU
    count: int  # of GPUs
    flops: float  # of all tokens, forward and backward; recomputation does not count
    tokens_per_second: float | None
    hours: float | None
    price: float | None  # USD
    kwh: float | None
    mfu: float  # share of the peak, 0 to 1
    mfu_source: str


def budget(
    config: TrainConfig, tokens: float, gpu: Gpu, num_gpus: int, *, mfu: float, mfu_source: str
) -> Budget:
    """What it costs to train on `tokens`. Evaluations, saves and compiling are left out.

    Args:
      config: the run, for its architecture and `data.seq_len`.
      tokens: to train on.
      gpu: the kind of GPU.
      num_gpus: how many.
      mfu: model FLOP utilisation, a share of the peak.
      mfu_source: where that share comes from, for the record.
    """
    per_token = 3 * flops_per_token(config.model, config.data.seq_len)
    rate = hours = price = kwh = None
    if gpu.peak_flops is not None:
        rate = mfu * gpu.peak_flops * num_gpus / per_token
        seconds = tokens / rate
        hours = seconds / 3600
        price, kwh = rent(gpu, num_gpus, seconds), energy(gpu, num_gpus, seconds)
    flops = per_token * tokens
    return Budget(gpu.name, num_gpus, flops, rate, hours, price, kwh, mfu, mfu_source)


def rent(gpu: Gpu, num_gpus: int, seconds: float) -> float | None:
    """USD to rent the GPUs for so long; None if the table has no price."""
    return None if gpu.price is None else gpu.price * num_gpus * seconds / 3600


def energy(gpu: Gpu, num_gpus: int, seconds: float) -> float:
    """The most that the boards of the GPUs may use in that time, in kWh; the host comes on top."""
    return gpu.power * num_gpus * seconds / 3600 / 1000


def measured_mfu(run_dir: str | Path) -> float:
    """The median MFU of a run's updates.

    Raises:
      InputError: there is no run, or it has no such record.
    """
    if not (Path(run_dir) / "metrics.jsonl").is_file():
        raise InputError(f"--mfu_from {run_dir}: no run there (no metrics.jsonl); name its run_dir")
    found = [record["mfu"] for record in read_metrics(run_dir) if _is_share(record.get("mfu"))]
    if not found:
        raise InputError(
            f"--mfu_from {run_dir}: no record there has an MFU, which only GPUs with a known peak "
            "have; name a run on such a GPU, or give --mfu"
        )
    return statistics.median(found)


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and 1e-6 <= value <= 1


def guide_minimum(num_params: float) -> float | None:
    """The fewest tokens that the published guide advises for a model of that size, if it does."""
    return next((tokens for size, tokens in _GUIDE_MINIMUM if num_params >= size), None)
