"""The published guide's entry point."""

from collections.abc import Sequence
from pathlib import Path

import jax

from inl_jax.config import InputError, with_fields
from inl_jax.config_file import load_config
from inl_jax.data.corpus import prepare
from inl_jax.data.tokenizer import Tokenizer
from inl_jax.planning.preflight import count_steps
from inl_jax.sampling import LanguageModel
from inl_jax.trainer import train
from inl_jax.training.metrics import Record


def train_inl_llm(
    data_path: str | Path | Sequence[str],
    model_size: str = "small",
    num_epochs: float = 3,
    batch_size: int = 8,
    learning_rate: float = 3e-4,
    max_samples: int | None = None,
    save_dir: str = "runs/inl_llm",
    device: str = "auto",
) -> tuple[LanguageModel, Tokenizer, list[Record]]:
    """The published guide's entry point, over `train`.

    Args:
      data_path: a source as in `DataConfig.paths`, or several.
      model_size: a preset: tiny, small, ..., 3b, 4b.
      num_epochs: passes over the training tokens.
      batch_size: sequences per update.
      learning_rate: peak learning rate.
      max_samples: documents to read; None reads all.
      save_dir: the run directory; a second call resumes the run.
      device: "auto", or the one that JAX must run on: "cpu", "cuda" (or "gpu").

    Returns:
      The model (its `generate` continues text), its tokenizer, and the records.

    Raises:
      InputError: as `train` does; also if JAX does not run on `device`.
    """
    wanted = {"auto": jax.default_backend(), "cuda": "gpu"}.get(device, device)
    if wanted != jax.default_backend():
        raise InputError(
            f"device={device}: JAX runs on {jax.default_backend()} here; install inl_jax[cuda] for "
            "a GPU, set JAX_PLATFORMS=cpu for the CPU, or pass device='auto'"
        )
    base = load_config(model_size)
    one = isinstance(data_path, str | Path)
    fields = {
        "data.paths": (str(data_path),) if one else tuple(map(str, data_path)),
        "data.max_documents": max_samples or 0,
        "optim.learning_rate": learning_rate,
        "optim.warmup_steps": 0,
        "num_steps": 0,
        "num_epochs": num_epochs,
        "batch_size": batch_size,
        "accumulate_steps": 1,
        "run_dir": save_dir,
    }
    config = with_fields(base, fields)
    # The preset's warmup, if the run is long enough for it. `train` finds the tokens in the cache.
    num_steps = count_steps(config, prepare(config.data))
    warmup = min(base.optim.warmup_steps, num_steps // 10)
    result = train(with_fields(config, {"optim.warmup_steps": warmup}))
    return result.model, result.tokenizer, result.history
