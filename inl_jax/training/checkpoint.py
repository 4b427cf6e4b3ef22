"""What a run leaves behind, and how it is read again: Orbax behind one small class.

RUN/config.json  tokenizer.json  metrics.jsonl  best.json
RUN/checkpoints/<step>/params       the parameters, readable alone
RUN/checkpoints/<step>/optimizer    optimizer state and counters
RUN/damaged/                        checkpoints that could not be read, moved aside
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from inl_jax.config import InputError, ModelConfig, TrainConfig, differences, from_json, to_json
from inl_jax.data.tokenizer import Tokenizer
from inl_jax.data.tokenizer import load as read_tokenizer
from inl_jax.internals import on_save_failure
from inl_jax.model.language_model import abstract_params
from inl_jax.parallel import processes

# Fields of the model that change neither the parameters nor the function they compute.
_FREE_FIELDS = (
    "model.remat",
    "model.attention_kernel",
    "model.integrator_gradient",
    "model.integrator_segment",
    "model.integrator_chunk",
)
# Fields of the optimizer that decide what its state is made of.
_STATE_FIELDS = ("optim.optimizer", "optim.moment_dtype", "optim.rounding")


class _KeepLastAndBest:
    """Orbax's preservation policy: the newest `keep_last`, and the best by validation loss."""

    def __init__(self, keep_last: int, best: Path):
        self._keep_last, self._best = keep_last, best

    def should_preserve(self, checkpoints, *, context):
        del context
        newest = {c.step for c in checkpoints[-self._keep_last :]}
        best = _read_json(self._best).get("step")
        return [c.step in newest or c.step == best for c in checkpoints]


class Checkpoints:
    """The checkpoints of one run directory, for the process that trains it."""

    def __init__(self, run_dir: str | Path, *, keep_last: int):
        self._run_dir = Path(run_dir).absolute()
        self._best = self._run_dir / "best.json"
        self._orbax = ocp.training.Checkpointer(
            self._run_dir / "checkpoints",
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=_KeepLastAndBest(keep_last, self._best),
            cleanup_tmp_directories=True,
        )
        if jax.process_count() > 1:
            self._end_all_if_a_save_fails()

    def _end_all_if_a_save_fails(self) -> None:
        """Ends all processes as soon as one of them cannot write its part of a checkpoint."""

        def end_all(error: BaseException) -> None:
            processes.end(1, f"error: {self._run_dir}: a save failed ({_reason(error)})")

        on_save_failure(self._orbax, end_all)

    def save(
        self, step: int, params: Any, optimizer: Any = None, *, position: dict[str, Any]
    ) -> None:
        """Starts writing a checkpoint; returns once the arrays are safe from donation.

        Args:
          step: the update just finished.
          params: parameters.
          optimizer: any tree of arrays beside them; None for weights alone.
          position: plain values, given back by `restore`.
        """
        items = (
            {"params": params} if optimizer is None else dict(params=params, optimizer=optimizer)
        )
        self._orbax.save_checkpointables_async(step, items, custom_metadata=position)

    def restore(self, abstract: dict[str, Any], *, report=print) -> dict[str, Any] | None:
        """The newest checkpoint that can be read, or None where there is none.

        A checkpoint whose bytes are bad is moved to RUN/damaged and the next older one is tried.

        Args:
          abstract: `{"params": ..., "optimizer": ...}` of `jax.ShapeDtypeStruct` with shardings.
          report: told of checkpoints that could not be read.

        Returns:
          `{"params", "optimizer", "step", "position"}`.

        Raises:
          InputError: a checkpoint holds other shapes or types than asked for, or all are damaged.
        """
        folder = self._run_dir / "checkpoints"
        damaged: dict[int, str] = {}
        for step in reversed([c.step for c in self._orbax.checkpoints]):
            trouble = ""
            try:
                with _reading_alone():
                    metadata = ocp.checkpointables_metadata(folder / str(step))
                    _check_matches(metadata.metadata, abstract, folder / str(step))
                    if not metadata.custom_metadata:
                        raise OSError("its position in the data cannot be read")
                    loaded = ocp.load_checkpointables(folder / str(step), abstract)
            except InputError:
                raise
            except Exception as error:  # Orbax raises many types for bad bytes
                trouble = _reason(error)
            # Bad bytes may be in the part of one process only; all give the checkpoint up then.
            if troubles := list(filter(None, processes.gather(trouble))):
                damaged[step] = troubles[0]
                continue
            self._set_aside(damaged, report)
            return {**loaded, "step": step, "position": metadata.custom_metadata}
        if damaged:
            reasons = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
            raise InputError(
                f"{folder}: no checkpoint can be read ({reasons}); restore one from a copy, or "
                "choose another run_dir (with init_from, if only the optimizer is missing)"
            )
        return None

    def _set_aside(self, damaged: dict[int, str], report) -> None:
        for step, reason in damaged.items() if processes.first() else ():
            aside = self._run_dir / "damaged" / f"{step}-{time.strftime('%Y%m%d-%H%M%S')}"
            aside.parent.mkdir(exist_ok=True)
            os.replace(self._run_dir / "checkpoints" / str(step), aside)
            if _read_json(self._best).get("step") == step:
                self._best.unlink()
            report(f"checkpoint {step} could not be read and was moved to {aside}: {reason}")
        processes.gather()  # moved, before anyone looks again
        if damaged:
            self._orbax.reload()

    def note_validation(self, step: int, loss: float, *, basis: str = "") -> None:
        """Records a validation loss of a saved step; the lowest one's checkpoint is kept.

        Args:
          step: a step that was saved.
          loss: its validation loss.
          basis: what it was measured on; only losses on the same basis are compared.
        """
        best = _read_json(self._best)
        lowest = best["validation_loss"] if best.get("basis") == basis else float("inf")
        lower = loss < lowest  # false where it is NaN
        if processes.gather(str(lower))[0] == "False":  # as process 0 read it, before it writes
            return
        self.wait()  # best.json never names a checkpoint that is not on disk
        found = {"step": step, "validation_loss": loss, "basis": basis}
        if processes.first():
            write_text(self._best, json.dumps(found))
        processes.gather()  # so that all keep the same checkpoints

    def latest_step(self) -> int | None:
        """The newest saved step."""
        return self._orbax.latest.step if self._orbax.latest else None

    def wait(self) -> None:
        """Returns when everything asked for is on disk; raises what went wrong."""
        self._orbax.wait()

    def close(self) -> None:
        """Waits, and releases Orbax's threads."""
        self._orbax.close()


def _check_matches(saved: Any, wanted: Any, where: Path) -> None:
    """Raises `InputError` naming the first leaf whose shape or type differs, or that is missing.

    Raises `OSError` where the bytes of the metadata are bad: Orbax then gives None, not an error.
    """

    def leaves(tree):
        flat = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): _kind(leaf)
            for path, leaf in flat
        }

    for name in wanted:
        if saved.get(name) is None:
            raise OSError(f"the metadata of {name} cannot be read")
        found, asked = leaves(saved[name]), leaves(wanted[name])
        for leaf in [*asked, *found]:
            if found.get(leaf) != asked.get(leaf):
                raise InputError(
                    f"{where}: {name}/{leaf} is saved as {found.get(leaf, 'nothing')}, this config "
                    f"wants {asked.get(leaf, 'nothing')}: use the config of that run, or another "
                    "run_dir"
                )


@contextlib.contextmanager
def _reading_alone() -> Iterator[None]:
    """Orbax reads without waiting for other processes, which bad bytes may keep from coming."""
    me = jax.process_index()
    context = ocp.Context()
    context.multiprocessing.primary_host = me
    context.multiprocessing.active_processes = {me}
    context.multiprocessing.barrier_sync_key_prefix = f"process_{me}"
    with context:
        yield


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def _kind(leaf: Any) -> str:
    return f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}"


def check_run(config: TrainConfig, tokenizer: Tokenizer, *, report=print) -> None:
    """Checks that this config may start in its run directory, or go on with the run there.

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
            afresh = " with init_from, for the weights alone" if of_state else ""
            raise InputError(
                f"{field}={now}, but the run in {run_dir} has {field}={before}: use that value "
                f"or another run_dir{afresh}"
            )
        if field not in ("run_dir", "name"):
            report(f"changed since this run was started: {field} {before} -> {now}")
    _check_tokenizer(run_dir, tokenizer)


def _check_tokenizer(run_dir: str | Path, tokenizer: Tokenizer) -> None:
    read_config(run_dir)  # says where there is no run
    saved = read_tokenizer(run_dir)
    if saved.fingerprint != tokenizer.fingerprint:
        raise InputError(
            f"data.tokenizer={tokenizer.name} ({tokenizer.vocab_size} ids, fingerprint "
            f"{tokenizer.fingerprint[:8]}), but the run in {run_dir} has {saved.name} "
            f"({saved.vocab_size} ids, {saved.fingerprint[:8]}): its weights mean those ids; use "
            f"that tokenizer ({run_dir}/tokenizer.json), or another run"
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


def read_config(run_dir: str | Path) -> TrainConfig:
    """The config a run was last started with.

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


def read_params(
    run_dir: str | Path, config: ModelConfig, *, step: int | str = "latest", shardings: Any = None
) -> tuple[int, Any]:
    """The parameters of a saved step, without the optimizer: (step, params).

    Args:
      run_dir: the run.
      config: its model.
      step: a saved step, "latest", or "best" (by validation loss).
      shardings: where to put them; one for each leaf. The default device by default.

    Raises:
      InputError: no such checkpoint, or it is damaged or does not fit the config.
    """
    folder = Path(run_dir).absolute() / "checkpoints"
    steps = sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())
    if step == "latest":
        chosen = steps[-1] if steps else None
    elif step == "best":
        chosen = _read_json(Path(run_dir) / "best.json").get("step")
    else:
        chosen = int(step) if str(step).isdecimal() else None
    if chosen not in steps:
        raise InputError(f"{run_dir}: no checkpoint {step!r}; there are {steps or 'none'}")
    abstract = abstract_params(config)
    if shardings is None:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: here, abstract)
    abstract = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
    )
    where = folder / str(chosen)
    try:
        saved = ocp.checkpointables_metadata(where).metadata
        _check_matches(saved, {"params": abstract}, where)
        return chosen, ocp.load_checkpointables(where, {"params": abstract})["params"]
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{where} is damaged ({_reason(error)}); there are {steps}") from error


def write_text(path: Path, text: str) -> None:
    """Writes a small file so that a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def _read_json(path: Path) -> dict[str, Any]:
    """An object, empty where the file is missing or damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def locked(run_dir: str | Path) -> Iterator[None]:
    """Keeps a run directory to one trainer at a time. Makes the directory.

    The processes of one trainer share it: process 0 locks for all.

    Raises:
      InputError: another process trains there, it cannot be made, or not all processes see it.
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
        except OSError:
            raise InputError(f"run_dir={run_dir}: another process trains there") from None
        processes.check_shared(Path(run_dir), "run_dir")
        yield  # the lock goes with the file, also when the process is killed
