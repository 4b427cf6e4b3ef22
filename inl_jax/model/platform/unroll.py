"""Whether the integrator's loop is compiled as straight code."""

from inl_jax.config import ModelConfig
from inl_jax.model.platform.device import current_device


def unrolled(config: ModelConfig) -> bool:
    """Whether `config.unroll` says so; with auto, whether it pays on `current_device`.

    A GPU's iterations wait for memory: as straight code they stack no trajectory, and one
    iteration's kernels do the next one's work. On a CPU straight iterations are slower than a loop,
    whose arrays stay in place.
    """
    if config.unroll == "auto":
        return current_device().platform == "gpu"
    return config.unroll == "iterations"
