"""Checkpoints: Orbax behind one small class. `run_dir.py` says what else is in a run directory."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from inl_jax.config import InputError, ModelConfig
from inl_jax.console import say
from inl_jax.files import read_json, write_text
from inl_jax.guest import own_logging
from inl_jax.internals import on_save_failure
from inl_jax.model.language_model import abstract_params
from inl_jax.orbax import ocp
from inl_jax.parallel import processes
from inl_jax.parallel.sharding import with_shardings


class _KeepLastAndBest:
    """Orbax's preservation policy: the newest `keep_last` and the best by validation loss."""

    def __init__(self, keep_last: int, best: Path):
        self._keep_last, self._best = keep_last, best

    def should_preserve(self, checkpoints, *, context):
        del context
        newest = {c.step for c in checkpoints[-self._keep_last :]}
        best = _read_best(self._best).get("step")
        return [c.step in newest or c.step == best for c in checkpoints]


class Checkpoints:
    """The checkpoints of one run directory, for the processes that train it."""

    def __init__(self, run_dir: str | Path, *, keep_last: int):
        self._run_dir = Path(run_dir).absolute()
        self._best = self._run_dir / "best.json"
        self._orbax = ocp.training.Checkpointer(
            self._run_dir / "checkpoints",
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=_KeepLastAndBest(keep_last, self._best),
            cleanup_tmp_directories=True,
        )
        self._saving = None  # Orbax's response to the save that is under way
        if jax.process_count() > 1:
            self._end_all_if_a_save_fails()

    def _end_all_if_a_save_fails(self) -> None:
        """Ends all processes as soon as one of them cannot write its part of a checkpoint.

        Without this Orbax lets the others wait for 20 minutes.
        """

        def end_all(error: BaseException) -> None:
            processes.end(1, f"error: {self._run_dir}: a save failed ({_reason(error)})")

        on_save_failure(self._orbax, end_all)

    def save(
        self, step: int, params: Any, optimizer: Any = None, *, position: dict[str, Any]
    ) -> None:
        """Starts writing a checkpoint; returns once the arrays may be donated.

        Args:
          step: the update just finished.
          params: the parameters.
          optimizer: any tree of arrays; None to save weights alone.
          position: plain values, which `restore` returns.
        """
        items = (
            {"params": params} if optimizer is None else dict(params=params, optimizer=optimizer)
        )
        self._finish_save()
        self._saving = self._orbax.save_checkpointables_async(step, items, custom_metadata=position)

    def _finish_save(self) -> None:
        """Waits for the save under way.

        Orbax ends the event loop and the threads of a save only in its response's `result()`: a
        response that is dropped leaks one thread and three file descriptors.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def restore(self, abstract: dict[str, Any]) -> dict[str, Any] | None:
        """The newest checkpoint that can be read, or None if there is none.

        A checkpoint whose bytes are bad is moved to RUN/damaged, and the next older one is tried.

        Args:
          abstract: `{"params": ..., "optimizer": ...}` of `jax.ShapeDtypeStruct` with shardings.

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
            self._set_aside(damaged)
            return {**loaded, "step": step, "position": metadata.custom_metadata}
        if damaged:
            reasons = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
            raise InputError(
                f"{folder}: no checkpoint can be read ({reasons}); restore one from a copy, or "
                "choose another run_dir (with init_from, if only the optimizer is missing)"
            )
        return None

    def _set_aside(self, damaged: dict[int, str]) -> None:
        for step, reason in damaged.items() if processes.first() else ():
            aside = self._run_dir / "damaged" / f"{step}-{time.strftime('%Y%m%d-%H%M%S')}"
            aside.parent.mkdir(exist_ok=True)
            os.replace(self._run_dir / "checkpoints" / str(step), aside)
            if self.best_step() == step:
                self._best.unlink()
            say(f"checkpoint {step} could not be read and was moved to {aside}: {reason}")
        processes.gather()  # moved, before anyone looks again
        if damaged:
            self._orbax.reload()

    def is_best(self, loss: float, *, basis: str = "") -> bool:
        """Whether a validation loss is lower than that of the best checkpoint.

        Args:
          loss: in nats per token; NaN is not lower.
          basis: what it was measured on; losses on another basis are not compared.
        """
        best = _read_best(self._best)
        lowest = best["validation_loss"] if best.get("basis") == basis else float("inf")
        return processes.gather(str(loss < lowest))[0] == "True"  # as process 0 read it

    def note_best(self, step: int, loss: float, *, basis: str = "") -> None:
        """Records that the saved `step` is the best, so that its checkpoint is kept.

        Args:
          step: a saved step.
          loss: its validation loss.
          basis: as in `is_best`.
        """
        self.wait()  # best.json never names a checkpoint that is not on disk
        found = {"step": step, "validation_loss": loss, "basis": basis}
        if processes.first():
            write_text(self._best, json.dumps(found))
        processes.gather()  # so that all keep the same checkpoints

    def resume_from(self, step: int) -> None:
        """Forgets a best checkpoint above `step`: it belongs to a branch that is abandoned."""
        if processes.first() and (self.best_step() or 0) > step:
            self._best.unlink()
        processes.gather()  # so that all keep the same checkpoints

    def best_step(self) -> int | None:
        """The step of the best checkpoint, by validation loss."""
        return _read_best(self._best).get("step")

    def steps(self) -> set[int]:
        """The saved steps."""
        return {c.step for c in self._orbax.checkpoints}

    def latest_step(self) -> int | None:
        """The newest saved step."""
        return self._orbax.latest.step if self._orbax.latest else None

    def wait(self) -> None:
        """Returns when every save is on disk; raises what went wrong."""
        self._finish_save()
        self._orbax.wait()

    def close(self) -> None:
        """Waits for the save under way and ends Orbax's threads."""
        try:
            self._finish_save()
        finally:
            self._orbax.close()


def _read_best(path: Path) -> dict[str, Any]:
    """What `note_best` wrote; empty if there is none or it is damaged."""
    best = read_json(path)
    sound = isinstance(best.get("step"), int) and isinstance(best.get("validation_loss"), float)
    return best if sound else {}


def _check_matches(saved: Any, wanted: Any, where: Path) -> None:
    """Raises `InputError` naming the first leaf that is missing or has another shape or type.

    Raises `OSError` if the bytes of the metadata are bad: Orbax then gives None, not an error.
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
                weights_alone = " with init_from, which takes the weights alone"
                raise InputError(
                    f"{where}: {name}/{leaf} is saved as {found.get(leaf, 'nothing')}, this config "
                    f"wants {asked.get(leaf, 'nothing')}: use the config of that run, or another "
                    f"run_dir{weights_alone if name == 'optimizer' else ''}"
                )


@contextlib.contextmanager
def _reading_alone() -> Iterator[None]:
    """Makes Orbax read without waiting for other processes: bad bytes may stop one of them."""
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


@own_logging()
def read_params(
    run_dir: str | Path, config: ModelConfig, *, step: int | str = "latest", shardings: Any = None
) -> tuple[int, Any]:
    """The parameters of a saved step, without the optimizer: (step, params).

    Args:
      run_dir: the run.
      config: its model.
      step: a saved step, "latest", or "best" (by validation loss).
      shardings: one for each parameter; all on the default device if None.

    Raises:
      InputError: no such checkpoint, or it is damaged or does not fit the config.
    """
    folder = Path(run_dir).absolute() / "checkpoints"
    steps = sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())
    if step == "latest":
        chosen = steps[-1] if steps else None
    elif step == "best":
        chosen = _read_best(Path(run_dir) / "best.json").get("step")
    else:
        chosen = int(step) if str(step).isdecimal() else None
    if chosen not in steps:
        raise InputError(
            f"{run_dir}: no checkpoint {step!r}; there are {steps or 'none'}, and the names latest "
            "and best"
        )
    abstract = abstract_params(config)
    if shardings is None:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: here, abstract)
    abstract = with_shardings(abstract, shardings)
    where = folder / str(chosen)
    try:
        saved = ocp.checkpointables_metadata(where).metadata
        _check_matches(saved, {"params": abstract}, where)
        return chosen, ocp.load_checkpointables(where, {"params": abstract})["params"]
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{where} is damaged ({_reason(error)}); there are {steps}") from error
