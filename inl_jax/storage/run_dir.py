"""A run directory: what is in it, who may train there, and whether a config may resume it.

RUN/config.json  tokenizer.json  metrics.jsonl  best.json  env.json  lock
RUN/checkpoints/<step>/params       the parameters, readable alone
RUN/checkpoints/<step>/optimizer    optimizer state and counters
RUN/damaged/                        checkpoints that could not be read, moved aside
RUN/samples/<step>.md               generation checks
RUN/trackers/                       what the trackers have sent, and their logs
RUN/events.out.tfevents.*           TensorBoard's
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from inl_jax.config import InputError, TrainConfig, with_fields
from inl_jax.config_file import differences, from_json, to_json
from inl_jax.console import say
from inl_jax.data.pins import pinned_paths, pinned_tokenizer
from inl_jax.files import write_text
from inl_jax.parallel import processes
from inl_jax.tokens.tokenizer import Tokenizer
from inl_jax.tokens.tokenizer import load as read_tokenizer

# Fields of the model that change neither the parameters nor the function they compute.
_FREE_FIELDS = """model.remat model.attention_kernel model.integrator_gradient
model.integrator_segment model.integrator_chunk""".split()
# Fields of the optimizer that decide what its state is made of.
_STATE_FIELDS = ("optim.optimizer", "optim.moment_dtype", "optim.rounding")


def check_run(
    config: TrainConfig, tokenizer: Tokenizer | None = None, *, tell: Callable[[str], None] = say
) -> None:
    """Checks that this config may start in its run directory, or resume the run there.

    Calls `tell` with a line for each change. A tokenizer that is not given is not checked.

    Raises:
      InputError: the run there has another model or tokenizer; the field and both values are named.
    """
    run_dir = Path(config.run_dir)
    if not (run_dir / "config.json").exists():
        if config.init_from:
            _check_tokenizer(config.init_from, tokenizer)
        return
    saved = any(path.name.isdigit() for path in (run_dir / "checkpoints").glob("*"))
    for field, before, now in differences(read_config(run_dir), config):
        of_state = saved and field in _STATE_FIELDS
        if of_state or (field.startswith("model.") and field not in _FREE_FIELDS):
            afresh = " with init_from, which takes the weights alone" if of_state else ""
            raise InputError(
                f"{field}={now}, but the run in {run_dir} has {field}={before}: use that value "
                f"or another run_dir{afresh}"
            )
        if field == "init_from" and now:
            raise InputError(
                f"init_from={now}, but the run in {run_dir} exists and resumes from its own "
                f"checkpoints{before and f' (it began from {before})'}: leave it out, or name "
                "another run_dir"
            )
        if field not in ("run_dir", "name"):
            tell(f"changed since the last start: {field} {before} -> {now}")
    _check_tokenizer(run_dir, tokenizer)


def _check_tokenizer(run_dir: str | Path, tokenizer: Tokenizer | None) -> None:
    read_config(run_dir)  # raises if there is no run
    saved = read_tokenizer(run_dir)
    if tokenizer and saved.fingerprint != tokenizer.fingerprint:
        raise InputError(
            f"data.tokenizer={tokenizer.name} ({tokenizer.vocab_size} ids, fingerprint "
            f"{tokenizer.fingerprint[:8]}), but the run in {run_dir} has {saved.name} "
            f"({saved.vocab_size} ids, {saved.fingerprint[:8]}), and its weights belong to those "
            f"ids: use that tokenizer ({run_dir}/tokenizer.json), or another run"
        )


def record_run(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Writes the config and the tokenizer into the run directory."""
    if not processes.first():
        return
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    if not (run_dir / "config.json").exists():
        tokenizer.save(run_dir)
    write_text(run_dir / "config.json", to_json(config))


def pinned(config: TrainConfig) -> TrainConfig:
    """`config` with a commit for each dataset and tokenizer of the hub: the run's own, if it began.

    Every process calls it; process 0 asks the hub.

    Raises:
      InputError: the hub cannot be asked.
    """
    names = []
    if processes.first():
        began = os.path.exists(Path(config.run_dir) / "config.json")  # False for an impossible path
        recorded = read_config(config.run_dir).data if began else config.data
        names = [
            pinned_tokenizer(config.data.tokenizer, recorded.tokenizer),
            *pinned_paths(config.data.paths, recorded.paths),
        ]
    tokenizer, *paths = json.loads(processes.gather(json.dumps(names))[0])
    return with_fields(config, {"data.tokenizer": tokenizer, "data.paths": tuple(paths)})


def read_config(run_dir: str | Path) -> TrainConfig:
    """The config with which a run was last started.

    Raises:
      InputError: there is no run.
    """
    path = Path(run_dir) / "config.json"
    if not path.is_file():
        raise InputError(f"{run_dir}: not a run directory (no config.json in it)")
    try:
        return from_json(path.read_text())
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged ({error}); restore it from a copy") from None


@contextlib.contextmanager
def locked(run_dir: str | Path) -> Iterator[None]:
    """Makes the run directory and keeps other trainers out of it.

    Process 0 holds the lock for all processes of a run.

    Raises:
      InputError: another process trains there, the directory cannot be made, or not all processes
        see it.
    """
    if not processes.first():
        processes.check_shared(Path(run_dir), "run_dir")
        yield
        return
    try:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        handle = open(Path(run_dir) / "lock", "a")
    except OSError as error:
        raise InputError(f"run_dir={run_dir}: {error.strerror}; name a directory") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"run_dir={run_dir}: another process trains there; wait for it, or name another "
                "run_dir"
            ) from None
        except OSError as error:  # some network file systems have no locks
            say(
                f"WARNING: run_dir={run_dir}: this file system has no locks ({error.strerror}); "
                "start no second run there"
            )
        processes.check_shared(Path(run_dir), "run_dir")
        yield  # the lock goes with the file, also if the process is killed
