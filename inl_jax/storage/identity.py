"""What a checkpoint says of its run: the config and the tokenizer that its weights belong to.

The files lie in a checkpoint as they lie in the run directory, so that either can be made good.
"""

import os
from pathlib import Path
from typing import NamedTuple

from inl_jax.checks import require
from inl_jax.config import InputError, TrainConfig
from inl_jax.config_file import differences, from_json, to_json
from inl_jax.files import write_text
from inl_jax.storage.manifest import holds
from inl_jax.tokens.tokenizer import FILE_NAME as TOKENIZER_NAME
from inl_jax.tokens.tokenizer import Tokenizer
from inl_jax.tokens.tokenizer import load as load_tokenizer
from inl_jax.tokens.tokenizer_files import CONFIG_NAME as TOKENIZER_CONFIG_NAME

CONFIG_NAME = "config.json"
# Fields of the model that change neither the parameters nor the function they compute.
FREE_FIELDS = """model.remat model.attention_kernel model.integrator_gradient
model.integrator_segment model.integrator_kernel model.integrator_chunk model.trajectory_dtype
model.unroll""".split()
_FILES = (CONFIG_NAME, TOKENIZER_NAME, TOKENIZER_CONFIG_NAME)


class Identity(NamedTuple):
    """What a run is: its config, as asked for, and its tokenizer."""

    config: TrainConfig
    tokenizer: Tokenizer

    def write(self, directory: Path) -> None:
        """Writes both into a checkpoint or a run directory.

        Raises:
          OSError: they cannot be written.
        """
        self.tokenizer.save(directory)
        write_text(directory / CONFIG_NAME, to_json(self.config))


def steps_on_disk(run_dir: str | Path) -> list[int]:
    """The saved steps of a run, oldest first."""
    folder = Path(run_dir) / "checkpoints"
    names = os.listdir(folder) if os.path.isdir(folder) else ()  # none for an impossible path
    return sorted(int(name) for name in names if name.isdecimal())


def newest_identity(run_dir: str | Path) -> Path | None:
    """The newest checkpoint that holds its run's identity undamaged; None if there is none.

    An older version saved none, and a kill right after the commit of a checkpoint leaves none.
    """
    folders = (Path(run_dir) / "checkpoints" / str(s) for s in reversed(steps_on_disk(run_dir)))
    return next((folder for folder in folders if holds(folder, _FILES)), None)


def read_config_file(path: Path) -> TrainConfig:
    """The config that a file holds.

    Raises:
      InputError: it cannot be read, or is damaged.
    """
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except Exception as error:  # many types, for JSON that is not of a config
        raise InputError(f"{path}: damaged ({error}); restore it from a copy") from None


def check_config(step_dir: Path, config: TrainConfig, *, of: str | Path, advice: str) -> None:
    """Checks that a config has the model that a checkpoint was trained with.

    Args:
      step_dir: the checkpoint; one without an identity is not checked.
      config: the config.
      of: what the message calls it.
      advice: what to do if it does not fit.

    Raises:
      InputError: it does not; the field and both values are named.
    """
    if not (step_dir / CONFIG_NAME).is_file():
        return
    saved = read_config_file(step_dir / CONFIG_NAME)
    for field, then, now in differences(saved.model, config.model, "model."):
        require(
            field in FREE_FIELDS,
            f"{of} has {field}={now}, but {step_dir} was trained with {field}={then}: {advice}",
        )


def check_tokenizer(step_dir: Path, tokenizer: Tokenizer, *, of: str | Path, advice: str) -> None:
    """Checks that a tokenizer is the one that a checkpoint was trained with, as `check_config`."""
    if not (step_dir / TOKENIZER_NAME).is_file():
        return
    saved = load_tokenizer(step_dir)
    require(
        saved.fingerprint == tokenizer.fingerprint,
        f"{of} is {tokenizer.name} ({tokenizer.vocab_size} ids, fingerprint "
        f"{tokenizer.fingerprint[:8]}), but {step_dir} was trained with {saved.name} "
        f"({saved.vocab_size} ids, {saved.fingerprint[:8]}): {advice}",
    )
