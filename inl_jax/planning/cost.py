"""The arithmetic of training, and how much of a GPU's peak it uses."""

from jax.sharding import Mesh

from inl_jax.config import ModelConfig, TrainConfig
from inl_jax.planning.hardware import gpu_of


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """FLOPs of a forward pass's matrix products, per token of a sequence of `seq_len`.

    A training step takes three times as many, whatever it recomputes: the backward pass has two
    products for each one. A multiply-add counts as 2. The controllers' product with the context
    counts once, and the product with the zero velocity at t = 0 does not count. Attention counts
    over the (S + 1) / 2 positions that a token sees on average.
    """
    c = config
    D, T, Q4C = c.d_model, c.num_iterations, 4 * c.controller_width
    attention = 2 * D * (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    attention += 2 * 2 * c.num_heads * c.head_dim * (seq_len + 1) // 2
    of_mixer = {"mean": 2 * D * D, "decay": 2 * D * D, "gated": 8 * D * D, "attention": attention}
    contexts = sum(of_mixer[mixer] for mixer in c.mixers) * (c.num_layers // len(c.mixers))
    integrator = 2 * D * Q4C * (3 * T) if T > 0 else 0  # T outputs, T states, T-1 velocities, 1 h
    feed_forward = 2 * 2 * D * c.d_ff
    return contexts + c.num_layers * (integrator + feed_forward) + 2 * D * c.vocab_size


def utilization(
    config: TrainConfig, mesh: Mesh, tokens_per_second: float, seq_len: int = 0
) -> dict[str, float]:
    """`{"mfu": share}` of the devices' bfloat16 peak that training uses; {} if no peak is known.

    Model FLOP utilisation as Chowdhery et al. (PaLM, 2022) define it, 0 to 1: recomputation does
    not count as use. `seq_len` is of these tokens' sequences, `data.seq_len` if 0.
    """
    gpu = gpu_of(mesh.devices.flat[0].device_kind)
    if gpu is None or gpu.peak_flops is None:
        return {}
    flops = 3 * flops_per_token(config.model, seq_len or config.data.seq_len)
    return {"mfu": tokens_per_second * flops / (gpu.peak_flops * mesh.size)}
