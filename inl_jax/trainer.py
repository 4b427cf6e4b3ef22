"""Training: `train(config)`, and the loop round the training step."""

import contextlib
import json
import time
from collections.abc import Callable
from typing import Any, Literal

import jax

from inl_jax import curriculum as phases
from inl_jax.checklist import check_setup
from inl_jax.config import TrainConfig, with_fields
from inl_jax.console import aside, count, muted, plural, say
from inl_jax.data import batches
from inl_jax.environment import record_environment
from inl_jax.evaluation import evaluate, validation_record
from inl_jax.failures import Diverged
from inl_jax.guest import own_logging
from inl_jax.initial_weights import check_start, kept_tokenizer
from inl_jax.parallel import processes
from inl_jax.parallel.sharding import any_process, local_rows, on, place
from inl_jax.planning.cost import utilization
from inl_jax.planning.out_of_memory import explained
from inl_jax.planning.preflight import count_steps, plan_run, prepare_data
from inl_jax.result import TrainResult
from inl_jax.sampling import LanguageModel
from inl_jax.start import Start, restore_or_init, say_rate_change
from inl_jax.storage.checkpoint import Checkpoints
from inl_jax.storage.identity import Identity
from inl_jax.storage.run_dir import locked, pinned, record_run
from inl_jax.training.metrics import MetricsLog, Record, kind, latest, read_metrics, update_record
from inl_jax.training.optim import learning_rates
from inl_jax.training.reader import Reader
from inl_jax.training.state import Layout, TrainState, split_state
from inl_jax.training.step import compile_step, why_skipped
from inl_jax.training.stop import StopRequest
from inl_jax.training.trackers import Trackers
from inl_jax.training.watchdog import UPDATE, Watchdog
from inl_jax.watch.divergence import Losses
from inl_jax.watch.gpu_use import GpuUse, peak_memory
from inl_jax.watch.integrator_probe import fixed_batch, measure_dynamics
from inl_jax.watch.progress import Standing, Stretch, lowest, over_fitting, standing
from inl_jax.watch.samples import make_samples, write_samples
from inl_jax.watch.step_timer import StepTimer


@own_logging()
def train(config: TrainConfig, *, on_record: Callable[[Record], None] | None = None) -> TrainResult:
    """Trains the run that `config` describes, or resumes it. Every process calls it alike.

    Args:
      config: the run, as asked for. It is recorded so, and fitted to the mesh here.
      on_record: called on process 0 with each record, a dict of numbers, once it is written. What
        it raises ends the run.

    Raises:
      InputError: the config, the data, the machine or the run directory does not fit.
      Diverged: too many updates in a row were not finite; the message names the last good
        checkpoint.
      MachineFailure: memory or disk ran out, or no update was finished for too long.
      Stopped: SIGTERM came before the first update.
    """
    first = processes.first()
    with StopRequest(answers=first) as stop, muted(not first):
        check_setup(config)
        config = pinned(config)
        plan, why = plan_run(config)
        fitted, mesh, layout = plan
        corpus = prepare_data(config, kept_tokenizer(config))
        check_start(config, corpus.tokenizer)
        identity = Identity(config, corpus.tokenizer)
        stop.hold()  # Orbax would take an exception while it reads for a damaged checkpoint
        with (
            locked(config.run_dir) as lock,
            explained(config, plan),
            on(mesh),
            contextlib.closing(
                Checkpoints(
                    config.run_dir, keep_last=config.keep_last, identity=identity, lock=lock
                )
            ) as saved,
            contextlib.closing(MetricsLog(config.run_dir, on_record=on_record)) as log,
        ):
            make_state, start = restore_or_init(fitted, layout, saved, corpus)
            at = {"step": start.step, "position": start.position}
            num_steps = count_steps(config, corpus, **at)
            curriculum = phases.make_curriculum(config, num_steps, read=start.read, **at)
            log.resume_from(start.step)
            saved.resume_from(start.step)
            run = Run(fitted, mesh, corpus, curriculum, num_steps, saved, log, start)
            run.recover_best()
            if not run.is_over():  # a run that is over stays as it is
                say_rate_change(config, start.step)
                record_run(config, corpus.tokenizer)
                if processes.first():
                    chosen = {"remat": fitted.model.remat, "micro_batches": fitted.accumulate_steps}
                    record_environment(config.run_dir, recipe=chosen | {"why": why})
            trackers = Trackers(
                config.track, config.run_dir, project=config.project, step=start.step
            )
            with (
                contextlib.closing(trackers),
                contextlib.closing(run.gpu_use),
                contextlib.closing(run.watchdog),
                contextlib.closing(run.read()) as reader,  # from here on, while programs compile
            ):
                stop.release()
                announce(run)
                step_fns = {} if run.is_over() else compile_steps(run, layout)
                state = make_state()
                run.catch_up(state)
                ended = run.is_over(tell=True)
                if not ended:
                    with run.watchdog.during(UPDATE):
                        state, ended = run.loop(step_fns, state, reader, stop)
                stop.hold()  # what follows is quick, and must not be lost
        processes.gather()  # process 0 has written the log
        step = int(state.step)
        history = read_metrics(config.run_dir, up_to=step)
        return TrainResult(config, state.params, corpus.tokenizer, history, step, ended)


def announce(run: "Run") -> None:
    """Says what is about to run."""
    config, corpus, num_steps = run.config, run.corpus, run.num_steps
    tokens = run.curriculum.tokens(run.position(num_steps))
    per_update = config.batch_size * config.data.seq_len
    at_most = "up to " if any(phase.seq_len for phase in config.data.phases) else ""
    train_tokens = sum(files.train_tokens for files in corpus.sources)
    say(
        f"{num_steps:,} updates of {at_most}{per_update:,} tokens ({config.batch_size} sequences "
        f"of {config.data.seq_len}, {plural(config.accumulate_steps, 'micro-batch')}) = "
        f"{tokens / train_tokens:.2f} epochs of {count(train_tokens)} tokens"
    )
    if config.patience and config.patience * config.eval_every >= num_steps:
        say(
            f"WARNING: patience={config.patience} cannot stop this run: it ends at update "
            f"{num_steps}, with evaluations every {config.eval_every}"
        )
    windows = [batches.count_windows(files, config.data.seq_len) for files in corpus.sources]
    for line in phases.describe(run.curriculum, config, num_steps, *run.start[:2], windows):
        say(line)


def compile_steps(run: "Run", layout: Layout) -> dict[int, Any]:
    """The compiled step for each length of the sequences to come, before the first update."""
    lengths = phases.lengths_ahead(run.curriculum, run.start.position, run.position(run.num_steps))
    configs = {s: with_fields(run.config, {"data.seq_len": s, "data.phases": ()}) for s in lengths}
    return {s: compile_step(config, run.mesh, layout) for s, config in configs.items()}


class Run:
    """The loop of one run."""

    def __init__(self, config, mesh, corpus, curriculum, num_steps, checkpoints, log, start: Start):
        self.config, self.mesh, self.corpus, self.curriculum = config, mesh, corpus, curriculum
        self.num_steps, self.start = num_steps, start
        self.checkpoints, self.log, self.timer = checkpoints, log, StepTimer()
        self.watchdog = Watchdog(factor=config.stall_factor, limit=config.stall_limit)
        self.nonfinite_in_a_row, self.losses = 0, Losses(config.model.vocab_size)
        past = read_metrics(config.run_dir, up_to=start.step)
        self.started = time.monotonic() - latest(past, "elapsed")
        self.gpu_use = GpuUse(jax.local_devices(), energy_kwh=latest(past, "energy_kwh"))
        self.basis = f"{corpus.fingerprint}/{config.data.seq_len}/{config.eval_sequences}"
        evaluations = [r for r in past if "validation_loss" in r]
        mine = json.dumps([evaluations, [kind(r) for r in past if r["step"] == start.step]])
        self.evaluations, self.kinds_there = json.loads(processes.gather(mine)[0])  # of process 0
        self.stretch = Stretch() if "validation_loss" in self.kinds_there else start.stretch

    def catch_up(self, state: TrainState) -> None:
        """Records what the update that a run resumes from lacks, if it was stopped after its save.

        That may be its evaluation, the measurement of its integrators, or its samples.
        """
        step, there, c = self.start.step, self.kinds_there, self.config
        if step > 0 and (step == self.num_steps or _due(step, c.eval_every)):
            if "validation_loss" not in there:
                self.evaluate(state, step)
            elif "dynamics" not in there:
                self.probe(state, step)
        if step > 0 and _due(step, c.sample_every) and "samples" not in there:
            self.sample(state, step)

    def recover_best(self) -> None:
        """Notes the best checkpoint if a kill came between its evaluation and the note."""
        if self.evaluations and self.evaluations[-1].get("basis", self.basis) != self.basis:
            say("the validation text changed: the best evaluation and patience count anew")
        best = lowest(self.evaluations, basis=self.basis, among=self.checkpoints.steps())
        if best and self.checkpoints.is_best(best["validation_loss"], basis=self.basis):
            self.checkpoints.note_best(best["step"], best["validation_loss"], basis=self.basis)

    def is_over(self, *, tell: bool = False) -> Literal["complete", "stopped early", ""]:
        """How the run ended where this process starts, if it did; says so if told to."""
        step = self.start.step
        if step >= self.num_steps:
            if tell:
                say(f"the run is complete at update {step}; raise num_steps to continue it")
            return "complete"
        return "stopped early" if self.out_of_patience(step, tell=tell) else ""

    def read(self) -> Reader:
        """Starts reading this process's rows of the batches to come."""
        c = self.config

        def to_come():  # a generator: the thread that reads also imports grain
            samples = batches.training_samples(self.corpus, c.data, c.seed, self.curriculum)
            yield from batches.training_batches(
                samples,
                position=self.start.position,
                batch_size=c.batch_size,
                rows=local_rows(self.mesh, c.batch_size),
                num_batches=self.num_steps - self.start.step,
            )

        return Reader(to_come())

    def loop(self, step_fns, state, reader: Reader, stop: StopRequest) -> tuple[TrainState, str]:
        """Updates until the end or a stop; returns the state and how it ended."""
        c, step, last = self.config, self.start.step, self.num_steps
        rates, any_stop, pending = learning_rates(c.optim, last), any_process(self.mesh), None
        beginnings = phases.beginnings(self.curriculum, c, self.start.step, self.start.position)
        stop.enter_loop()
        self.timer.start(step)
        placed = (place(self.mesh, batch) for batch in self.watchdog.inputs(reader, stop))
        for step, batch in enumerate(self.timer.inputs(placed), start=self.start.step + 1):
            if step in beginnings:
                say(f"update {step}/{last}  {beginnings[step]}")
            state, metrics = step_fns[batch.shape[1] - 1](state, batch, rates[step - 1])
            if pending:  # one update late, so that the next one is dispatched before we wait
                self.look_at(state, *pending)
            pending = step, metrics
            stopping = any_stop(stop.requested is not None)  # several processes: one update late
            save = step == last or stopping or _due(step, c.save_every)
            validate = step == last or _due(step, c.eval_every)
            sample = _due(step, c.sample_every)
            if not (save or validate or sample):
                continue
            self.look_at(state, *pending)
            pending = None
            if stopping:
                return self.leave(state, step)
            if save and (step == last or self.losses.allow_saving(step)):
                self.save(state, step)  # before anything that could fail
            if validate:
                self.evaluate(state, step)
            if sample:
                self.sample(state, step)
            if validate and step < last and self.out_of_patience(step):
                self.save(state, step, wait=True)
                return state, "stopped early"
            self.timer.start(step)
        if step < last:  # no batch came
            if pending:
                self.look_at(state, *pending)
            return self.leave(state, step)
        self.save(state, step, wait=True)  # signals are still caught: it must not be lost
        say(f"complete: update {last} is saved in {c.run_dir}")
        return state, "complete"

    def leave(self, state: TrainState, step: int) -> tuple[TrainState, str]:
        """Saves the state after update `step` and ends the run before its end."""
        saved = ", and saved" if step > 0 else ": there is nothing to save"
        if step > 0:
            self.save(state, step, wait=True)
        if self.watchdog.gave_up:
            raise self.watchdog.stalled(step, self.config)
        say(f"stopped at update {step} as asked{saved}; the same command resumes")
        return state, "interrupted"

    def look_at(self, state: TrainState, step: int, metrics: dict[str, jax.Array]) -> None:
        """Fetches the metrics of an update: watches that they are finite, and records them."""
        c = self.config
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        self.nonfinite_in_a_row = 0 if values["finite"] else self.nonfinite_in_a_row + 1
        self.losses.add(step, values["loss"])
        if why := why_skipped(values):
            say(f"update {step} skipped: {why} ({values['skipped']} skipped so far)")
        else:
            self.stretch = self.stretch.add(values["loss"])
        self.log.progress(step, self.num_steps, values["loss"])
        diverged = self.nonfinite_in_a_row >= c.max_nonfinite_steps
        if diverged or step in (1, self.num_steps) or _due(step, c.log_every):
            seconds, input_wait = self.timer.lap(step)
            seq_len = self.curriculum.seq_len_of(self.position(step) - 1)
            rate = c.batch_size * seq_len / seconds
            record = update_record(values, step, self.num_steps, seconds, rate, input_wait)
            record |= self.progress(step) | utilization(c, self.mesh, rate, seq_len)
            self.log.write(record | peak_memory(jax.local_devices()) | self.gpu_use.record())
        self.watchdog.progress()
        if diverged:
            if not self.checkpoints.steps():  # else this state would push out a better one
                self.save(state, int(state.step), wait=True)
            saved, best = self.checkpoints.steps(), self.checkpoints.best_step()
            in_a_row = self.nonfinite_in_a_row
            raise Diverged(self.losses.describe_divergence(in_a_row, step, c, saved, best))

    def position(self, step: int) -> int:
        """Samples consumed after `step` updates."""
        return self.start.position + (step - self.start.step) * self.config.batch_size

    def progress(self, step: int) -> Record:
        """How far the run is: samples, tokens, epochs; seconds of all its starts; the time."""
        seen = self.position(step)
        tokens = self.curriculum.tokens(seen)
        windows = sum(
            batches.count_windows(files, self.config.data.seq_len) for files in self.corpus.sources
        )
        return {
            "samples_seen": seen,
            "tokens": tokens,
            "epoch": tokens / (windows * self.config.data.seq_len),
            "elapsed": time.monotonic() - self.started,
            "time": time.time(),
        }

    def stamped(self, step: int) -> Record:
        """The beginning of a record."""
        return {"step": step, "num_steps": self.num_steps, "time": time.time()}

    def save(self, state: TrainState, step: int, *, wait: bool = False) -> None:
        """Starts saving the state, once for each step; with `wait` it is then on disk."""
        position = {
            "samples_seen": self.position(step),
            "seq_len": self.config.data.seq_len,
            "data": self.corpus.fingerprint,
            "phases": phases.note_read(self.curriculum, self.position(step)),
            "stretch": list(self.stretch),
        }
        with self.watchdog.during("a save"):
            if self.checkpoints.latest_step() != step:
                self.checkpoints.save(step, **split_state(state), position=position)
            if wait:
                self.checkpoints.wait()

    def evaluate(self, state: TrainState, step: int) -> None:
        """Records the validation loss, and saves the best. Does nothing without validation text."""
        c = self.config
        if sum(files.validation_tokens for files in self.corpus.sources) == 0:
            return
        windows = batches.eval_batches(
            self.corpus,
            seq_len=c.data.seq_len,
            batch_size=c.batch_size // c.accumulate_steps,
            max_sequences=c.eval_sequences,
        )
        result = None
        with self.watchdog.beside("the evaluation", step):
            windows = self.watchdog.each(windows)
            result = evaluate(
                c.model, state.params, windows, mesh=self.mesh, loss_chunk=c.loss_chunk
            )
        if result is None:
            return
        best = self.checkpoints.is_best(result.loss, basis=self.basis)
        record = validation_record(result, c.data, step, self.num_steps) | self.progress(step)
        record |= over_fitting(result.loss, self.stretch) | {"best": best, "basis": self.basis}
        self.stretch = Stretch()
        self.evaluations.append(record)
        if c.patience:
            record["patience_left"] = max(0, c.patience - self.standing().waited)
        self.log.write(record)
        if best:
            self.save(state, step)
            self.checkpoints.note_best(step, result.loss, basis=self.basis)
        self.probe(state, step)

    def probe(self, state: TrainState, step: int) -> None:
        """Records what the integrators do on a fixed text."""
        c, dynamics = self.config, {}
        with self.watchdog.beside("the integrator's dynamics", step):
            tokens = fixed_batch(self.corpus, c.model)
            dynamics = measure_dynamics(c.model, state.params, tokens, mesh=self.mesh)
        if dynamics:
            self.log.write(self.stamped(step) | {"dynamics": dynamics})

    def standing(self) -> Standing:
        """How the last evaluation compares with the ones before."""
        return standing(self.evaluations, basis=self.basis, min_delta=self.config.min_delta)

    def out_of_patience(self, step: int, *, tell: bool = True) -> bool:
        """Whether the evaluations up to `step` stop the run early; says so."""
        c = self.config
        found = self.standing()
        over = 0 < c.patience <= found.waited
        if over and tell:
            say(
                f"stopped early at update {step}: {plural(found.waited, 'evaluation')} without an "
                f"improvement on {found.best_loss:.4f} of update {found.best_step}"
                f"{f' by more than {c.min_delta}' if c.min_delta else ''}; the best is "
                f"update {self.checkpoints.best_step()} (--step best); raise patience={c.patience} "
                "to continue"
            )
        return over

    def sample(self, state: TrainState, step: int) -> None:
        """Records a continuation of each sample prompt. Cannot end the run."""
        c = self.config
        model = LanguageModel(c.model, state.params, self.corpus.tokenizer, mesh=self.mesh)
        samples = []
        with self.watchdog.beside("the samples", step):
            samples = make_samples(model, c.sample_prompts, max_new_tokens=c.sample_tokens)
        with aside(f"writing the samples at update {step}"):
            if samples and processes.first():
                write_samples(c.run_dir, step, samples)
        if samples:
            self.log.write(self.stamped(step) | {"samples": samples})


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
