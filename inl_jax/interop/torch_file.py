"""PyTorch's .pt files, read without running code from them."""

from pathlib import Path

import numpy as np

from inl_jax.config import InputError


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Name to float array; bfloat16 becomes float32.

    A file that holds a training state is read at its `model_state_dict`.

    Raises:
      InputError: PyTorch is not installed, or the file is not a state_dict.
    """
    try:
        import torch
    except ImportError:
        raise InputError("reading .pt files needs PyTorch: pip install 'inl_jax[torch]'") from None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types, and advises to read unsafely
        raise InputError(
            f"{path}: not a .pt file that can be read without running code from it "
            f"({type(error).__name__}); save the model's state_dict() alone"
        ) from error
    loaded = loaded.get("model_state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(loaded, dict) or not all(hasattr(v, "numpy") for v in loaded.values()):
        raise InputError(
            f"{path}: not a state_dict (a mapping of names to tensors); save the model's "
            "state_dict()"
        )
    return {
        name: (value.float() if value.dtype == torch.bfloat16 else value).detach().numpy()
        for name, value in loaded.items()
    }
