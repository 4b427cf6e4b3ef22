"""The arithmetic of a token."""

import jax
from jax.sharding import Mesh

from inl_jax.config import ModelConfig, TrainConfig

# Dense bfloat16 peak in FLOP/s by device kind, from the makers' data sheets (without sparsity).
PEAK_FLOPS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090": 71e12,
}


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Matrix-product FLOPs of a forward pass, per token of a sequence of `seq_len`.

    A training step is three times this (backward is two products for each one), whatever is
    recomputed. Counted: 2 per multiply-add; the context term of the controllers once; no product
    with the zero velocity at t = 0; attention over the (S + 1) / 2 positions seen on average.
    """
    c = config
    D, T, Q4C = c.d_model, c.num_iterations, 4 * c.controller_width
    if c.context == "attention":
        projections = 2 * D * (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        context = projections + 2 * 2 * c.num_heads * c.head_dim * (seq_len + 1) // 2
    else:
        context = 2 * D * D
    integrator = 2 * D * Q4C * (3 * T) if T > 0 else 0  # T outputs, T states, T-1 velocities, 1 h
    feed_forward = 2 * 2 * D * c.d_ff
    return c.num_layers * (context + integrator + feed_forward) + 2 * D * c.vocab_size


def peak_flops(device: jax.Device) -> float | None:
    """The device's dense bfloat16 peak in FLOP/s, or None where it is not known."""
    return PEAK_FLOPS.get(device.device_kind)


def utilization(config: TrainConfig, mesh: Mesh, tokens_per_second: float) -> dict[str, float]:
    """`{"mfu": ...}`, the share of the devices' peak that training uses; {} if it is not known."""
    peak = peak_flops(mesh.devices.ravel()[0])
    if peak is None:
        return {}
    flops = 3 * flops_per_token(config.model, config.data.seq_len)
    return {"mfu": tokens_per_second * flops / (peak * mesh.size)}
