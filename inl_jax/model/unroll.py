"""Which loop of the model is compiled as straight code."""

from typing import Literal

from inl_jax.config import ModelConfig
from inl_jax.model.device import current_device

MOST_LAYERS = 8  # as straight code: the time to compile grows with them


def unrolled(config: ModelConfig) -> Literal["none", "layers", "iterations"]:
    """The loop that `config.unroll` names; with auto, the one that pays on `current_device`.

    A GPU's iterations wait for memory: as straight code they stack no trajectory, and one
    iteration's kernels do the next one's work. On a CPU straight iterations are slower than a loop,
    whose arrays stay in place. A few straight layers are faster: what the backward pass keeps is
    not stacked. They are no help to remat, which keeps next to nothing.
    """
    if config.unroll != "auto":
        return config.unroll
    if current_device().platform == "gpu":
        return "iterations"
    return "layers" if config.num_layers <= MOST_LAYERS and config.remat == "none" else "none"
