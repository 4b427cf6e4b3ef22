"""A run directory: what is in it, who may train there, and whether a config may resume it.

RUN/config.json  tokenizer.json  metrics.jsonl  best.json  last_save.json  env.json  lock
RUN/checkpoints/<step>/params       the parameters, readable alone
RUN/checkpoints/<step>/optimizer    optimizer state and counters
RUN/checkpoints/<step>/manifest.json, and config.json and tokenizer.json as the run has them
RUN/damaged/                        checkpoints that could not be read, moved aside
RUN/samples/<step>.md               generation checks
RUN/trackers/                       what the trackers have sent, and their logs
RUN/events.out.tfevents.*           TensorBoard's
"""

import contextlib
import fcntl
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from inl_jax.config import InputError, TrainConfig, with_fields
from inl_jax.config_file import differences, to_json
from inl_jax.console import say
from inl_jax.data.pins import pinned_paths, pinned_tokenizer
from inl_jax.failures import DiskFull, MachineFailure
from inl_jax.files import remove_unfinished, write_text
from inl_jax.parallel import processes
from inl_jax.storage.disk import write_failure
from inl_jax.storage.identity import (
    CONFIG_NAME,
    FREE_FIELDS,
    check_config,
    check_tokenizer,
    newest_identity,
    read_config_file,
    steps_on_disk,
)
from inl_jax.tokens.tokenizer import FILE_NAME as TOKENIZER_NAME
from inl_jax.tokens.tokenizer import Tokenizer
from inl_jax.tokens.tokenizer import load as load_tokenizer
from inl_jax.training.metrics import read_metrics

LAST_SAVE = "last_save.json"  # names the last step that was saved
# Fields of the optimizer that decide what its state is made of.
_STATE_FIELDS = ("optim.optimizer", "optim.moment_dtype", "optim.rounding")


def has_begun(run_dir: str | Path) -> bool:
    """Whether there is a run, even one that has lost its config."""
    return os.path.lexists(Path(run_dir) / CONFIG_NAME) or bool(steps_on_disk(run_dir))


def check_run(
    config: TrainConfig, tokenizer: Tokenizer | None = None, *, tell: Callable[[str], None] = say
) -> None:
    """Checks that this config may start in its run directory, or resume the run there.

    Calls `tell` with a line for each change. A tokenizer that is not given is not checked.

    Raises:
      InputError: the run there has another model or tokenizer, and the field and both values are
        named; or it has lost its checkpoints.
    """
    run_dir = Path(config.run_dir)
    saved = bool(steps_on_disk(run_dir))
    if not saved:
        _check_not_lost(run_dir, tell)
    if not has_begun(run_dir):
        return
    saved_tokenizer = read_tokenizer(run_dir)
    if tokenizer:  # first, since a model of other sizes may be another tokenizer's
        file = run_dir / TOKENIZER_NAME
        check_tokenizer_of(f"the run in {run_dir}", saved_tokenizer, tokenizer, file=file)
    changed = list(differences(read_config(run_dir), config))
    of_model = [one for one in changed if one[0].startswith("model.") and one[0] not in FREE_FIELDS]
    of_state = [one for one in changed if saved and one[0] in _STATE_FIELDS]
    if of_model or of_state:
        afresh = "" if of_model else " with init_from, which takes the weights alone"
        raise unequal(
            of_model + of_state, f"the run in {run_dir} has", f"name another run_dir{afresh}"
        )
    for field, before, now in changed:
        if field == "init_from" and now:
            raise InputError(
                f"init_from={now}, but the run in {run_dir} exists and resumes from its own "
                f"checkpoints{before and f' (it began from {before})'}: leave it out, or name "
                "another run_dir"
            )
        if field not in ("run_dir", "name"):
            tell(f"changed since the last start: {field} {before} -> {now}")


def unequal(fields: Sequence[tuple[str, Any, Any]], theirs_are: str, otherwise: str) -> InputError:
    """The mistake that a config has other values than a run, or than weights, that it must share.

    Args:
      fields: each with their value and that of the config.
      theirs_are: before their values, such as `the run in runs/tiny has`.
      otherwise: what to do instead of taking all of theirs.
    """
    ours = ", ".join(f"{field}={own}" for field, _, own in fields)
    theirs = ", ".join(f"{field}={their}" for field, their, _ in fields)
    flags = " ".join(f"--{field} {their}" for field, their, _ in fields)
    return InputError(f"{ours}, but {theirs_are} {theirs}: add {flags}, or {otherwise}")


def _check_not_lost(run_dir: Path, tell: Callable[[str], None]) -> None:
    """Raises `InputError` if a run has no checkpoint although it saved some."""
    log = read_metrics(run_dir)
    noted = (run_dir / LAST_SAVE).exists() or (run_dir / "best.json").exists()
    if not log:
        if noted:
            tell(f"the checkpoints and the log of the run in {run_dir} are gone: it starts at 0")
        return
    step = log[-1]["step"]
    if noted or not (run_dir / "checkpoints").is_dir():
        raise InputError(
            f"{run_dir}: the log is at update {step}, but checkpoints/ is gone or empty: restore "
            "it from a copy, name another run_dir, or remove metrics.jsonl to start at update 0"
        )
    tell(f"nothing was saved before the run in {run_dir} ended at update {step}: it starts at 0")


def check_tokenizer_of(what: str, saved: Tokenizer, tokenizer: Tokenizer, *, file: Path) -> None:
    """Checks that a run's tokenizer is the one that weights were trained with.

    Args:
      what: what messages call the weights.
      saved: their tokenizer.
      tokenizer: that of the run.
      file: where theirs is.

    Raises:
      InputError: it is another.
    """
    if saved.fingerprint != tokenizer.fingerprint:
        raise InputError(
            f"data.tokenizer={tokenizer.name} ({tokenizer.vocab_size} ids, fingerprint "
            f"{tokenizer.fingerprint[:8]}), but {what} has {saved.name} ({saved.vocab_size} ids, "
            f"{saved.fingerprint[:8]}), and its weights belong to those ids: add --data.tokenizer "
            f"{file}, or name another run"
        )


def record_run(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Writes the config and the tokenizer into the run directory.

    Raises:
      MachineFailure: the disk is full, or fails.
    """
    if not processes.first():
        return
    run_dir = Path(config.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            load_tokenizer(run_dir)
        except InputError:  # missing, or damaged
            tokenizer.save(run_dir)
        write_text(run_dir / CONFIG_NAME, to_json(config))
    except OSError as error:
        raise write_failure(error, run_dir) from error


def pinned(config: TrainConfig) -> TrainConfig:
    """`config` with a commit for each dataset and tokenizer of the hub: the run's own, if it began.

    Every process calls it; process 0 asks the hub.

    Raises:
      InputError: the hub cannot be asked.
    """
    names = []
    if processes.first():
        begun = has_begun(config.run_dir)
        recorded = read_config(config.run_dir).data if begun else config.data
        names = [
            pinned_tokenizer(config.data.tokenizer, recorded.tokenizer),
            *pinned_paths(config.data.paths, recorded.paths),
        ]
    tokenizer, *paths = json.loads(processes.gather(json.dumps(names))[0])
    return with_fields(config, {"data.tokenizer": tokenizer, "data.paths": tuple(paths)})


def read_config(run_dir: str | Path) -> TrainConfig:
    """The config with which a run was last started; that of its newest checkpoint if it is lost.

    Raises:
      InputError: there is no run, its config is damaged, or that of a run with another model.
    """
    path, saved = Path(run_dir) / CONFIG_NAME, newest_identity(run_dir)
    try:
        if not path.is_file():
            raise InputError(
                f"{run_dir}: not a run directory (no config.json in it)"
                if not steps_on_disk(run_dir)
                else f"{path} is gone, and the checkpoints there do not hold it: restore it from a "
                "copy, or name another run"
            )
        config = read_config_file(path)
    except InputError:
        if saved is None:
            if any(Path(run_dir).glob("*.safetensors")):
                raise InputError(
                    f"{run_dir}: exported weights, not a run directory; make a run of them: "
                    f"inl import --weights {run_dir} --out NEW"
                ) from None
            raise
        _say_once(f"{path} is missing or damaged: taken from {saved / CONFIG_NAME}")
        return read_config_file(saved / CONFIG_NAME)
    if saved is not None:
        check_config(saved, config, of=path, advice=f"copy {saved / CONFIG_NAME} over it")
    return config


def warn_without_records(run_dir: str | Path, text: str) -> None:
    """Warns of an evaluation on `text` if it is not known what the weights were trained on.

    `inl import` leaves a run so.
    """
    if not read_metrics(run_dir):
        say(
            f"WARNING: {run_dir} has no records of a training: its weights may have been trained "
            f"on {text}"
        )


def read_tokenizer(run_dir: str | Path) -> Tokenizer:
    """The tokenizer of a run; that of its newest checkpoint if it is lost.

    Raises:
      InputError: there is none, it is damaged, or the weights belong to another.
    """
    path, saved = Path(run_dir) / TOKENIZER_NAME, newest_identity(run_dir)
    try:
        tokenizer = load_tokenizer(run_dir)
    except InputError:
        if saved is None:
            raise
        _say_once(f"{path} is missing or damaged: taken from {saved / TOKENIZER_NAME}")
        return load_tokenizer(saved)
    if saved is not None and not _same_bytes(path, saved / TOKENIZER_NAME):
        check_tokenizer(saved, tokenizer, of=path, advice=f"copy {saved / TOKENIZER_NAME} over it")
    return tokenizer


_say_once = functools.cache(say)  # a start reads these files several times


def _same_bytes(a: Path, b: Path) -> bool:
    return b.is_file() and a.read_bytes() == b.read_bytes()


class Lock:
    """The hold of one training on its run directory, made by `locked`."""

    def __init__(self, run_dir: Path):
        """Makes the directory and locks it.

        Raises:
          InputError: another process trains there, or the directory cannot be made.
          DiskFull: there is no space for it.
        """
        self._run_dir = run_dir
        self._handles: dict[Path, int] = {}
        try:
            self._take()
        except BaseException:
            self.release()
            raise

    def _take(self) -> None:
        """Locks the directory and a file in it, if they are not locked yet.

        The lock of the directory outlives the file's removal, and some network file systems have
        locks for files only.
        """
        trouble = []
        for path in (self._run_dir, self._run_dir / "lock"):
            if path in self._handles:
                continue
            try:
                if path == self._run_dir:
                    path.mkdir(parents=True, exist_ok=True)
                flags = os.O_RDONLY if path.is_dir() else os.O_WRONLY | os.O_CREAT
                handle = os.open(path, flags | os.O_NONBLOCK, 0o666)  # a pipe never blocks
            except OSError as error:
                failure = write_failure(error, self._run_dir)
                if isinstance(failure, DiskFull):
                    raise failure from error
                advice = "name a directory" if path == self._run_dir else "remove that file"
                raise InputError(f"run_dir={path}: {error.strerror}; {advice}") from None
            self._handles[path] = handle
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"run_dir={self._run_dir}: another process trains there; wait for it, or name "
                    "another run_dir"
                ) from None
            except OSError as error:  # ENOSYS and others: no locks of this kind
                trouble.append(error.strerror)
        if len(trouble) == 2:
            say(
                f"WARNING: run_dir={self._run_dir}: this file system has no locks ({trouble[1]}); "
                "start no second run there"
            )

    def renew(self) -> None:
        """Checks that the directory and its lock are still those that are held.

        What somebody removed is made and locked again.

        Raises:
          MachineFailure: another directory, or the lock of another training, is in their place.
        """
        for path, handle in list(self._handles.items()):
            try:
                same = os.path.samestat(os.fstat(handle), os.stat(path))
            except FileNotFoundError:
                os.close(self._handles.pop(path))
                continue
            if not same:
                raise MachineFailure(
                    f"{path} was replaced while this run trained there, so nothing more is saved "
                    "in it; let one training at a time use a run_dir"
                )
        try:
            self._take()
        except InputError as error:  # somebody was faster
            raise MachineFailure(str(error)) from None

    def release(self) -> None:
        """Lets others train there."""
        while self._handles:
            os.close(self._handles.popitem()[1])


@contextlib.contextmanager
def locked(run_dir: str | Path) -> Iterator[Lock | None]:
    """Makes the run directory and keeps other trainers out of it.

    Process 0 holds the lock for all processes of a run; the others get None.

    Raises:
      InputError: another process trains there, the directory cannot be made, or not all processes
        see it.
    """
    if not processes.first():
        processes.check_shared(Path(run_dir), "run_dir")
        yield None
        return
    lock = Lock(Path(run_dir))
    try:
        remove_unfinished(Path(run_dir))
        processes.check_shared(Path(run_dir), "run_dir")
        yield lock
    finally:
        lock.release()  # it also goes with the process, however that ends
