"""Training: `train(config)`, and the loop round the training step."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from inl_jax.config import TrainConfig, with_fields
from inl_jax.console import count, mute, plural, say
from inl_jax.data import batches
from inl_jax.data.corpus import Corpus
from inl_jax.data.tokenizer import Tokenizer
from inl_jax.evaluation import evaluate, validation_record
from inl_jax.parallel import processes
from inl_jax.parallel.sharding import (
    any_process,
    local_rows,
    on,
    place,
    shardings_of,
)
from inl_jax.planning.cost import utilization
from inl_jax.planning.preflight import count_steps, plan_run, prepare_data
from inl_jax.sampling import LanguageModel
from inl_jax.training.checkpoint import Checkpoints, read_params
from inl_jax.training.metrics import MetricsLog, Record, StepTimer, read_metrics, update_record
from inl_jax.training.optim import learning_rates
from inl_jax.training.run_dir import check_run, locked, read_config, record_run
from inl_jax.training.state import (
    Layout,
    TrainState,
    init_state,
    join_state,
    split_state,
    state_from_params,
)
from inl_jax.training.step import compile_step
from inl_jax.training.stop import StopRequest


class Diverged(RuntimeError):
    """Too many updates in a row had a non-finite loss or gradient."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What `train` returns."""

    config: TrainConfig
    params: Any = dataclasses.field(repr=False)
    tokenizer: Tokenizer = dataclasses.field(repr=False)
    history: list[Record] = dataclasses.field(repr=False)  # of the whole run, in order of updates
    step: int
    interrupted: bool

    @property
    def model(self) -> LanguageModel:
        """The trained model, ready to generate, on the mesh of the run."""
        mesh = jax.tree.leaves(self.params)[0].sharding.mesh
        return LanguageModel(self.config.model, self.params, self.tokenizer, mesh)


def train(config: TrainConfig, *, on_record: Callable[[Record], None] | None = None) -> TrainResult:
    """Trains the run that `config` describes, or resumes it. Every process calls it alike.

    Args:
      config: the run, as asked for. It is recorded so, and fitted to the mesh here.
      on_record: called on process 0 with each record, a dict of numbers, once it is written. What
        it raises ends the run.

    Raises:
      InputError: the config, the data, the machine or the run directory does not fit.
      Diverged: too many updates in a row were not finite. They changed nothing; the state is
        saved.
      Stopped: SIGTERM came before the first update.
    """
    with StopRequest() as stop:
        mute(not processes.first())
        fitted, mesh, layout = plan_run(config)
        corpus = prepare_data(config)
        samples = batches.training_samples(corpus, config.data, config.seed)
        check_run(config, corpus.tokenizer)
        stop.hold()  # Orbax would take an exception while it reads for a damaged checkpoint
        with (
            locked(config.run_dir),
            on(mesh),
            contextlib.closing(Checkpoints(config.run_dir, keep_last=config.keep_last)) as saved,
            contextlib.closing(MetricsLog(config.run_dir, on_record=on_record)) as log,
        ):
            state, position = restore_or_init(fitted, layout, saved, corpus)
            step = int(state.step)
            log.resume_from(step)
            saved.resume_from(step)
            num_steps = count_steps(config, corpus, step=step, position=position)
            if step < num_steps:  # a complete run stays as it is
                record_run(config, corpus.tokenizer)
            stop.release()
            announce(fitted, corpus, num_steps, mesh)
            run = Run(fitted, mesh, corpus, num_steps, saved, log, step=step, position=position)
            if evaluation_is_missing(config, step, num_steps):
                run.evaluate(state, step)
            interrupted = False
            if step < num_steps:
                step_fn = compile_step(fitted, mesh, layout)
                state, interrupted = run.loop(step_fn, state, samples, stop)
            else:
                say(f"the run is complete at update {step}; raise num_steps to continue it")
            stop.hold()  # what follows is quick, and must not be lost
        processes.gather()  # process 0 has written the log
        step = int(state.step)
        history = read_metrics(config.run_dir, up_to=step)
        return TrainResult(config, state.params, corpus.tokenizer, history, step, interrupted)


def announce(config: TrainConfig, corpus: Corpus, num_steps: int, mesh: Mesh) -> None:
    """Says what is about to run."""
    per_update = config.batch_size * config.data.seq_len
    train_tokens = sum(files.train_tokens for files in corpus.sources)
    say(
        f"{num_steps:,} updates of {per_update:,} tokens ({config.batch_size} sequences of "
        f"{config.data.seq_len}, {plural(config.accumulate_steps, 'micro-batch')}) = "
        f"{num_steps * per_update / train_tokens:.2f} epochs of {count(train_tokens)} tokens"
    )
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    device, unused = mesh.devices.ravel()[0], jax.device_count() - mesh.size
    say(
        f"{mesh.size} x {device.device_kind} ({device.platform}); mesh {axes}"
        + (f"; {unused} more devices are not used" if unused else "")
    )


def restore_or_init(
    config: TrainConfig, layout: Layout, checkpoints: Checkpoints, corpus: Corpus
) -> tuple[TrainState, int]:
    """The state to start from, and the number of samples consumed so far.

    A checkpoint is read straight into its shardings, and given weights are donated: memory never
    holds two states.
    """
    found = checkpoints.restore(split_state(layout.state))
    if found is not None:
        say(f"resuming from update {found['step']} in {config.run_dir}")
        return join_state(found), resumed_position(found["position"], config, corpus)
    shardings = shardings_of(layout.state)
    if config.init_from:
        # The types that were saved; another parameter type is cast to afterwards.
        saved = read_config(config.init_from).model.param_dtype
        source = with_fields(config, {"model.param_dtype": saved}).model
        step, params = read_params(config.init_from, source, shardings=shardings.params)
        say(f"starting from the weights of {config.init_from} at update {step}")
        params = jax.tree.map(lambda p: p.astype(config.model.param_dtype), params)
        fresh = jax.jit(
            functools.partial(state_from_params, config=config),
            out_shardings=shardings,
            donate_argnums=0,
        )
        return fresh(params), 0
    say(f"starting from random weights, seed {config.seed}, in {config.run_dir}")
    fresh = jax.jit(functools.partial(init_state, config=config), out_shardings=shardings)
    return fresh(jax.random.key(config.seed)), 0


def resumed_position(saved: dict[str, Any], config: TrainConfig, corpus: Corpus) -> int:
    """Samples consumed so far, counted in windows of this run. Says what changed in the data."""
    if saved["data"] != corpus.fingerprint:
        say("the training data changed since; it is read on from the same position")
    if saved["seq_len"] == config.data.seq_len:
        return saved["samples_seen"]
    say(
        f"data.seq_len was {saved['seq_len']}: the new windows start after the same number of "
        "tokens, in an order of their own"
    )
    return saved["samples_seen"] * saved["seq_len"] // config.data.seq_len


def evaluation_is_missing(config: TrainConfig, step: int, num_steps: int) -> bool:
    """Whether a run that resumes was stopped between the save of `step` and its evaluation."""
    due = step > 0 and (step == num_steps or _due(step, config.eval_every))
    records = read_metrics(config.run_dir, up_to=step)
    missing = not any(r["step"] == step and "validation_loss" in r for r in records)
    return due and processes.gather(str(missing))[0] == "True"  # process 0 reads for all


class Run:
    """The loop of one run."""

    def __init__(self, config, mesh, corpus, num_steps, checkpoints, log, *, step, position):
        self.config, self.mesh, self.corpus = config, mesh, corpus
        self.num_steps, self.start_step, self.start_position = num_steps, step, position
        self.checkpoints, self.log, self.timer = checkpoints, log, StepTimer()
        self.nonfinite_in_a_row = 0

    def loop(self, step_fn, state, samples, stop: StopRequest) -> tuple[TrainState, bool]:
        """Updates until the end or a stop; returns the state and whether it was stopped."""
        c, last = self.config, self.num_steps
        read = batches.training_batches(
            samples,
            position=self.start_position,
            batch_size=c.batch_size,
            rows=local_rows(self.mesh, c.batch_size),
            num_batches=last - self.start_step,
        )
        placed = (place(self.mesh, batch) for batch in read)
        rates, any_stop, pending = learning_rates(c.optim, last), any_process(self.mesh), None
        stop.enter_loop()
        self.timer.start(self.start_step)
        for step, batch in enumerate(self.timer.inputs(placed), start=self.start_step + 1):
            state, metrics = step_fn(state, batch, rates[step - 1])
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
            if save:  # before anything that could fail
                self.save(state, step)
            if stopping:
                self.checkpoints.wait()
                say(f"stopped at update {step} as asked, and saved; the same command resumes")
                return state, True
            if validate:
                self.evaluate(state, step)
            if sample:
                self.sample(state, step)
            self.timer.start(step)
        self.checkpoints.wait()  # signals are still caught: the last save must not be lost
        say(f"complete: update {last} is saved in {c.run_dir}")
        return state, False

    def look_at(self, state: TrainState, step: int, metrics: dict[str, jax.Array]) -> None:
        """Fetches the metrics of an update: watches that they are finite, and records them."""
        c = self.config
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        if values["finite"]:
            self.nonfinite_in_a_row = 0
        else:
            self.nonfinite_in_a_row += 1
            say(
                f"update {step} skipped: loss {values['loss']}, gradient norm "
                f"{values['grad_norm']} ({values['skipped']} skipped so far)"
            )
        self.log.progress(step, self.num_steps, values["loss"])
        diverged = self.nonfinite_in_a_row >= c.max_nonfinite_steps
        if diverged or step in (1, self.num_steps) or _due(step, c.log_every):
            seconds, input_wait = self.timer.lap(step)
            rate = c.batch_size * c.data.seq_len / seconds
            record = update_record(values, step, self.num_steps, seconds, rate, input_wait)
            record["samples_seen"] = self.position(step)
            self.log.write(record | utilization(c, self.mesh, rate))
        if diverged:
            # The state is one update newer than `step`. It is as good: skipped too, or finite.
            self.save(state, int(state.step))
            self.checkpoints.wait()
            raise Diverged(
                f"{self.nonfinite_in_a_row} updates in a row, up to update {step}, had a "
                f"non-finite loss or gradient (max_nonfinite_steps={c.max_nonfinite_steps}); they "
                f"changed nothing, and the state is saved in {c.run_dir}. Lower "
                "optim.learning_rate or look at the data"
            )

    def position(self, step: int) -> int:
        """Samples consumed after `step` updates."""
        return self.start_position + (step - self.start_step) * self.config.batch_size

    def save(self, state: TrainState, step: int) -> None:
        """Starts saving the state, once for each step."""
        if self.checkpoints.latest_step() == step:
            return
        position = {
            "samples_seen": self.position(step),
            "seq_len": self.config.data.seq_len,
            "data": self.corpus.fingerprint,
        }
        self.checkpoints.save(step, **split_state(state), position=position)

    def evaluate(self, state: TrainState, step: int) -> None:
        """Records the validation loss, and notes it for a saved step. Needs validation text."""
        c = self.config
        if sum(files.validation_tokens for files in self.corpus.sources) == 0:
            return
        windows = batches.eval_batches(
            self.corpus,
            seq_len=c.data.seq_len,
            batch_size=c.batch_size // c.accumulate_steps,
            max_sequences=c.eval_sequences,
        )
        result = evaluate(c.model, state.params, windows, mesh=self.mesh, loss_chunk=c.loss_chunk)
        self.log.write(validation_record(result, step, self.num_steps))
        if self.checkpoints.latest_step() == step:
            basis = f"{self.corpus.fingerprint}/{c.data.seq_len}/{c.eval_sequences}"
            self.checkpoints.note_validation(step, result.loss, basis=basis)

    def sample(self, state: TrainState, step: int) -> None:
        """Prints a continuation of each sample prompt."""
        c = self.config
        model = LanguageModel(c.model, state.params, self.corpus.tokenizer, mesh=self.mesh)
        texts = model.generate(
            c.sample_prompts, max_new_tokens=c.sample_tokens, temperature=0.8, seed=step
        )
        for prompt, text in zip(c.sample_prompts, texts, strict=True):
            say(f"sample at update {step}: {prompt}{text}")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
