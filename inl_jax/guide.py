"""The published guide's entry point."""

from collections.abc import Sequence
from pathlib import Path

import jax

from inl_jax.config import InputError, TrainConfig, with_fields
from inl_jax.config_file import load_config
from inl_jax.console import duration, say
from inl_jax.data.corpus import Corpus, prepare
from inl_jax.planning.budget import ASSUMED_MFU, budget
from inl_jax.planning.hardware import gpu_of
from inl_jax.planning.preflight import count_steps
from inl_jax.sampling import LanguageModel
from inl_jax.text.sniff import sniff
from inl_jax.tokens.tokenizer import Tokenizer
from inl_jax.trainer import train
from inl_jax.training.metrics import Record


def train_inl_llm(
    data_path: str | Path | Sequence[str | Path],
    model_size: str = "small",
    num_epochs: float = 3,
    batch_size: int = 8,
    learning_rate: float = 3e-4,
    max_samples: int | None = None,
    save_dir: str | Path = "runs/inl_llm",
    device: str = "auto",
) -> tuple[LanguageModel, Tokenizer, list[Record]]:
    """The published guide's entry point, over `train`. Numbers may be NumPy scalars.

    Args:
      data_path: a source as in `DataConfig.paths`, or several.
      model_size: a preset: tiny, small, ..., 3b, 4b.
      num_epochs: passes over the training tokens.
      batch_size: sequences per update.
      learning_rate: peak learning rate.
      max_samples: documents to read from each source: rows of a .jsonl or .parquet file, or files
        of a directory. A text file is one document, so it is read whole, and a line says so. None
        reads all.
      save_dir: the run directory; a second call resumes the run.
      device: "auto", or the one that JAX must run on: "cpu", "cuda" (or "gpu").

    Returns:
      The model (its `generate` continues text), its tokenizer, and the records.

    Raises:
      InputError: as `train` does; also if JAX does not run on `device`.
      KeyboardInterrupt: Ctrl-C or SIGTERM ended the run early. It is saved, and the same call
        resumes it. A loop over several runs ends as well.
    """
    wanted = {"auto": jax.default_backend(), "cuda": "gpu"}.get(device, device)
    if wanted != jax.default_backend():
        raise InputError(
            f"device={device}: JAX runs on {jax.default_backend()} here; install inl_jax[cuda] for "
            "a GPU, set JAX_PLATFORMS=cpu for the CPU, or pass device='auto'"
        )
    config = guide_config(
        data_path, model_size, num_epochs, batch_size, learning_rate, max_samples, save_dir
    )
    result = train(with_warmup(config, prepare(config.data)))  # `train` finds the tokens cached
    if result.interrupted:
        raise KeyboardInterrupt(f"stopped at update {result.step}; the same call resumes the run")
    return result.model, result.tokenizer, result.history


def guide_config(
    data_path: str | Path | Sequence[str | Path],
    model_size: str,
    num_epochs: float,
    batch_size: int,
    learning_rate: float,
    max_samples: int | None,
    save_dir: str | Path,
) -> TrainConfig:
    """The run that these arguments of `train_inl_llm` describe, with the warmup of the preset.

    Raises:
      InputError: there is no such size, or a value is impossible.
    """
    fields = {
        "data.paths": data_path if isinstance(data_path, list | tuple) else (data_path,),
        "data.max_documents": max_samples or 0,
        "optim.learning_rate": learning_rate,
        "num_steps": 0,
        "num_epochs": num_epochs,
        "batch_size": batch_size,
        "accumulate_steps": "auto",
        "run_dir": save_dir,
    }
    config = with_fields(load_config(model_size), fields)
    for path in config.data.paths if max_samples else ():
        file = Path(path).expanduser()
        if file.is_file() and sniff(file).format == "text":
            say(
                f"max_samples={max_samples} does nothing for {path}: a text file is one document; "
                f"take its first lines (head -n {max_samples}), or make it .jsonl, a row a sample"
            )
    return config


def with_warmup(config: TrainConfig, corpus: Corpus) -> TrainConfig:
    """`config` with a warmup of at most a tenth of its updates on `corpus`."""
    num_steps = count_steps(with_fields(config, {"optim.warmup_steps": 0}), corpus)
    warmup = min(config.optim.warmup_steps, num_steps // 10)
    return with_fields(config, {"optim.warmup_steps": warmup})


def time_needed(config: TrainConfig, corpus: Corpus) -> str:
    """Updates, and the time on the GPUs of this machine if their speed is known."""
    num_steps, per_update = count_steps(config, corpus), config.batch_size * config.data.seq_len
    kind, number = jax.devices()[0].device_kind, jax.device_count()
    updates, gpu = f"time: {num_steps:,} updates of {per_update:,} tokens", gpu_of(kind)
    if gpu is None or gpu.peak_flops is None:
        return f"{updates}; how fast {kind} is will show after a few of them"
    tokens = num_steps * per_update
    cost = budget(config, tokens, gpu, number, mfu=ASSUMED_MFU, mfu_source="assumed")
    return (
        f"{updates}, about {duration(cost.hours * 3600)} on {number} x {gpu.name} at "
        f"{cost.mfu:.0%} of its peak (assumed)"
    )
