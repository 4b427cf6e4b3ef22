"""Checkpoints: Orbax behind one small class. `run_dir.py` says what else is in a run directory."""

import contextlib
import itertools
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from inl_jax.config import InputError
from inl_jax.config_file import differences
from inl_jax.console import say
from inl_jax.failures import MachineFailure
from inl_jax.files import json_text, read_json, write_text
from inl_jax.internals import on_save_failure
from inl_jax.orbax import ocp
from inl_jax.parallel import processes
from inl_jax.storage.audit import find_damaged
from inl_jax.storage.disk import reason_of, write_failure
from inl_jax.storage.identity import (
    CONFIG_NAME,
    Identity,
    check_config,
    check_tokenizer,
    read_config_file,
    steps_on_disk,
)
from inl_jax.storage.manifest import has_manifest, verify, write_manifest
from inl_jax.storage.retention import Retention, read_best
from inl_jax.storage.run_dir import LAST_SAVE, Lock, record_run
from inl_jax.storage.shapes import check_shapes


class Checkpoints:
    """The checkpoints of one run directory, for the processes that train it."""

    def __init__(
        self,
        run_dir: str | Path,
        *,
        keep_last: int,
        identity: Identity | None = None,
        lock: Lock | None = None,
    ):
        """Opens the checkpoints of a run.

        Args:
          run_dir: the run directory.
          keep_last: how many of the newest to keep.
          identity: what the run is; written into each checkpoint, and compared with that of the
            checkpoint restored.
          lock: the hold on the run directory, checked before each save.

        Raises:
          MachineFailure: the directory cannot be written.
        """
        self._run_dir = Path(run_dir).absolute()
        self._folder = self._run_dir / "checkpoints"
        self._best = self._run_dir / "best.json"
        self._identity, self._lock = identity, lock
        self._kept = Retention(keep_last, self._best)
        self._needed = 0  # bytes of a checkpoint
        self._failed = False
        self._aside: set[int] = set()  # steps that were moved to RUN/damaged
        with self._writing():
            self._orbax = self._open()
        self._saving: Future[bool] | None = None  # of the save that is under way
        self._thread = ThreadPoolExecutor(1)
        logging.getLogger("absl").addFilter(_is_no_failed_save)
        if jax.process_count() > 1:
            self._end_all_if_a_save_fails()

    def _open(self) -> ocp.training.Checkpointer:
        """Opens the directory, without steps whose damaged metadata Orbax cannot read."""
        policies = ocp.training.save_decision_policies
        settings = {
            "save_decision_policy": policies.FixedIntervalPolicy(1),
            "preservation_policy": self._kept,
            "cleanup_tmp_directories": True,
        }
        try:
            return ocp.training.Checkpointer(self._folder, **settings)
        except Exception:
            damaged = find_damaged(self._run_dir)
            if not damaged:
                raise
            if len(damaged) == len(steps_on_disk(self._run_dir)):
                raise self._all_are_damaged(damaged) from None
            processes.gather()  # all have looked
            self._set_aside(damaged)
            return ocp.training.Checkpointer(self._folder, **settings)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns what the disk and Orbax raise in the block into one line."""
        try:
            yield
        except (InputError, MachineFailure):
            raise
        except Exception as error:
            self._failed = True
            self._remove_unfinished()
            raise write_failure(error, self._run_dir, needed=self._needed) from error

    def _remove_unfinished(self) -> None:
        """Gives the disk back that a failed save took."""
        for path in self._folder.glob("*.orbax-checkpoint-tmp*") if processes.first() else ():
            shutil.rmtree(path, ignore_errors=True)

    def _end_all_if_a_save_fails(self) -> None:
        """Ends all processes as soon as one of them cannot write its part of a checkpoint.

        Without this Orbax lets the others wait for 20 minutes.
        """

        def end_all(error: BaseException) -> None:
            self._remove_unfinished()
            failure = write_failure(error, self._run_dir, needed=self._needed)
            processes.end(failure.exit_code, f"error: {failure}")

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

        Raises:
          DiskFull: this save, or the one before, found no space.
          MachineFailure: one of them failed for another reason, or the run directory is another.
        """
        items = (
            {"params": params} if optimizer is None else dict(params=params, optimizer=optimizer)
        )
        self._finish_save()
        self._needed = sum(leaf.nbytes for leaf in jax.tree.leaves(items))
        with self._writing():
            if self._lock is not None:
                self._lock.renew()
            if self._identity is not None and not (self._run_dir / CONFIG_NAME).exists():
                say(f"{self._run_dir} lost its files while the run trains: they are written again")
                record_run(*self._identity)
            if processes.first():
                _make_and_remove(self._folder / f".{step}")
            saving = self._orbax.save_checkpointables_async(step, items, custom_metadata=position)
        self._saving = self._thread.submit(self._seal, step, saving)

    def _seal(self, step: int, saving: Any) -> bool:
        """Adds identity and manifest to a checkpoint once it is complete; returns whether it could.

        It runs beside the training. A kill before its end leaves a checkpoint that can be restored
        but not verified.
        """
        # Orbax ends the event loop and the threads of a save only here: a response that is dropped
        # leaks one thread and three file descriptors.
        saving.result()
        step_dir = self._folder / str(step)
        if not (processes.first() and step_dir.is_dir()):  # somebody removed the run
            return False
        if self._identity is not None:
            self._identity.write(step_dir)
        write_manifest(step_dir)
        write_text(self._run_dir / LAST_SAVE, json_text({"step": step}))
        return True

    def _finish_save(self) -> None:
        """Waits for the save under way, and removes what its success leaves over."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        with self._writing():
            sealed = processes.gather(str(saving.result()))[0] == "True"
            if sealed:
                self._kept.good = self.latest_step()
            # Process 0 may note another best meanwhile: what it decides here holds for all, because
            # they delete together.
            saved = self._orbax.checkpoints
            kept = self._kept.should_preserve(saved)
            others = [found.step for keep, found in zip(kept, saved, strict=True) if not keep]
            for step in json.loads(processes.gather(json.dumps(others))[0]):
                self._orbax.delete(step, missing_ok=True)

    def restore(self, abstract: dict[str, Any]) -> dict[str, Any] | None:
        """The newest checkpoint that can be read, or None if there is none.

        A checkpoint that is not as it was saved is moved to RUN/damaged, and the next older one is
        tried.

        Args:
          abstract: `{"params": ..., "optimizer": ...}` of `jax.ShapeDtypeStruct` with shardings.

        Returns:
          `{"params", "optimizer", "step", "position"}`.

        Raises:
          InputError: a checkpoint holds other shapes or types than asked for, or is of another
            run, or all are damaged.
        """
        folder, damaged = self._folder, {}
        for step in reversed([c.step for c in self._orbax.checkpoints]):
            trouble = remark = ""
            try:
                with _reading_alone():
                    share = {"part": jax.process_index(), "parts": jax.process_count()}
                    remark = verify(folder / str(step), **share)
                    self._check_identity(folder / str(step))
                    metadata = ocp.checkpointables_metadata(folder / str(step))
                    check_shapes(metadata.metadata, abstract, folder / str(step))
                    if not metadata.custom_metadata:
                        raise OSError("its position in the data cannot be read")
                    loaded = ocp.load_checkpointables(folder / str(step), abstract)
            except InputError:
                raise
            except Exception as error:  # Orbax raises many types for bad bytes
                trouble = reason_of(error)
            # Bad bytes may be in the part of one process only; all give the checkpoint up then.
            if troubles := list(filter(None, processes.gather(trouble))):
                damaged[step] = troubles[0]
                continue
            self._set_aside(damaged)
            if damaged:
                self._orbax.reload()
            self._note_restored(step, remark)
            return {**loaded, "step": step, "position": metadata.custom_metadata}
        if damaged:
            raise self._all_are_damaged(damaged)
        if processes.first():
            (self._run_dir / LAST_SAVE).unlink(missing_ok=True)
        return None

    def _check_identity(self, step_dir: Path) -> None:
        if self._identity is None:
            return
        config, tokenizer = self._identity
        afresh = "use that value, or name another run_dir"
        check_config(step_dir, config, of="this config", advice=afresh)
        check_tokenizer(step_dir, tokenizer, of="data.tokenizer", advice=afresh)

    def _set_aside(self, damaged: dict[int, str]) -> None:
        self._aside |= damaged.keys()
        for step, reason in damaged.items() if processes.first() else ():
            with self._writing():
                aside = _move_aside(self._folder / str(step), self._run_dir / "damaged")
                if self.best_step() == step:
                    self._best.unlink()
            say(f"checkpoint {step} could not be read and was moved to {aside}: {reason}")
        processes.gather()  # moved, before anyone looks again

    def _all_are_damaged(self, damaged: dict[int, str]) -> InputError:
        reasons = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
        return InputError(
            f"{self._folder}: no checkpoint can be read ({reasons}); restore one from a copy, or "
            "choose another run_dir (with init_from, if only the optimizer is missing)"
        )

    def _note_restored(self, step: int, remark: str) -> None:
        """Says what is odd about the step restored, and notes which is known to be good."""
        if remark:
            say(f"checkpoint {step} {remark}")
        if self._identity is not None:
            self._compare_with_the_last_start(self._folder / str(step))
        last = read_json(self._run_dir / LAST_SAVE).get("step")
        if isinstance(last, int) and last > step and last not in self._aside:
            say(f"WARNING: checkpoint {last} was saved here and is gone; {step} is the newest left")
        manifests = (s for s in self.steps() if has_manifest(self._folder / str(s)))
        good = processes.gather(str(max(manifests, default="")))[0]  # as process 0 sees them
        self._kept.good = int(good) if good else None

    def _compare_with_the_last_start(self, step_dir: Path) -> None:
        """Says if a checkpoint was saved with another config, as that of another run was."""
        try:
            then, last = (read_config_file(p / CONFIG_NAME) for p in (step_dir, self._run_dir))
        except InputError:  # one is missing, or damaged
            return
        for field, saved, started in differences(then, last):
            say(
                f"checkpoint {step_dir.name} was saved with {field}={saved}, but the last start of "
                f"this run had {started}"
            )

    def is_best(self, loss: float, *, basis: str = "") -> bool:
        """Whether a validation loss is lower than that of the best checkpoint.

        Args:
          loss: in nats per token; NaN is not lower.
          basis: what it was measured on; losses on another basis are not compared.
        """
        best = read_best(self._best)
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
            with self._writing():
                write_text(self._best, json_text(found))
        processes.gather()  # so that all keep the same checkpoints

    def resume_from(self, step: int) -> None:
        """Forgets a best checkpoint above `step`: it belongs to a branch that is abandoned."""
        if processes.first() and (self.best_step() or 0) > step:
            self._best.unlink()
        processes.gather()  # so that all keep the same checkpoints

    def best_step(self) -> int | None:
        """The step of the best checkpoint, by validation loss."""
        return read_best(self._best).get("step")

    def steps(self) -> set[int]:
        """The saved steps."""
        return {c.step for c in self._orbax.checkpoints}

    def latest_step(self) -> int | None:
        """The newest saved step."""
        return self._orbax.latest.step if self._orbax.latest else None

    def wait(self) -> None:
        """Returns when every save is on disk and verified; raises as `save` does."""
        self._finish_save()

    def close(self) -> None:
        """Waits for the save under way, as `wait` does, and ends Orbax's threads."""
        try:
            with self._writing():
                if self._saving is not None:
                    self._saving.result()  # without the other processes: they may have failed
        finally:
            self._thread.shutdown()
            with contextlib.suppress(Exception) if self._failed else self._writing():
                self._orbax.close()  # raises a failure that `save` or `wait` raised again
            if self._failed:
                self._remove_unfinished()  # other threads of Orbax may have written until now
            else:  # after a failure they may still log
                logging.getLogger("absl").removeFilter(_is_no_failed_save)


def _is_no_failed_save(entry: logging.LogRecord) -> bool:
    """Keeps Orbax's tracebacks of a failed save off the console: `Checkpoints` raises one line."""
    return not (entry.exc_info and "orbax" in entry.pathname)


def _make_and_remove(directory: Path) -> None:
    """Raises `OSError` if a directory cannot be made there: Orbax would wait for it for minutes."""
    directory.mkdir(parents=True, exist_ok=True)
    directory.rmdir()


def _move_aside(step_dir: Path, folder: Path) -> Path:
    """Moves a checkpoint to a name of its own in a folder; returns that."""
    folder.mkdir(exist_ok=True)
    stem = f"{step_dir.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (folder / (f"{stem}-{i}" if i else stem) for i in itertools.count())
    aside = next(path for path in names if not os.path.lexists(path))
    os.replace(step_dir, aside)
    return aside


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
