"""Training: `train(config)`, the loop round the training step."""

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh

from inl_jax.config import InputError, TrainConfig
from inl_jax.config_file import load_config
from inl_jax.console import say
from inl_jax.data import batches as data
from inl_jax.data.corpus import Corpus, prepare
from inl_jax.data.tokenizer import Tokenizer
from inl_jax.evaluation import Evaluation, evaluate
from inl_jax.parallel import processes
from inl_jax.parallel.sharding import RULES, any_process, local_rows, make_mesh, place, spread_rows
from inl_jax.planning.preflight import (
    check_machine,
    check_same_config,
    check_sample,
    count_steps,
    prepare_everywhere,
)
from inl_jax.sampling import LanguageModel
from inl_jax.training import metrics
from inl_jax.training.checkpoint import (
    Checkpoints,
    check_run,
    locked,
    read_config,
    read_params,
    record_run,
)
from inl_jax.training.optim import any_length_optimizer
from inl_jax.training.step import (
    TrainState,
    abstract_state,
    compile_step,
    init_state,
    join_state,
    split_state,
    state_from_params,
)
from inl_jax.training.stop import StopRequest

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: saved; the same command goes on from there
EXIT_DIVERGED = 3


class Diverged(RuntimeError):
    """Too many updates in a row had a non-finite loss or gradient."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What `train` returns."""

    config: TrainConfig
    params: Any
    tokenizer: Tokenizer
    history: list[dict[str, Any]]  # the log records of the whole run, in order
    step: int
    interrupted: bool

    @property
    def model(self) -> LanguageModel:
        """The trained model, ready to generate."""
        return LanguageModel(self.config.model, self.params, self.tokenizer)


def train(config: TrainConfig) -> TrainResult:
    """Trains, or goes on with, the run that `config` describes; every process calls it alike.

    Raises:
      InputError: the config, the data, the machine or the run directory does not fit.
      Diverged: too many updates in a row were not finite. The state before them is saved.
      Stopped: SIGTERM before the first update.
    """
    with StopRequest() as stop:
        mesh = make_mesh(config.mesh)
        check_same_config(config)
        abstract = abstract_state(config, mesh)
        check_machine(config, mesh, abstract, report=say)
        corpus = prepare_everywhere(config)
        data.check(corpus, config.model.vocab_size)
        samples = data.training_samples(corpus, config.data, config.seed)
        check_sample(config, corpus.tokenizer)
        count_steps(config, corpus)
        check_run(config, corpus.tokenizer, report=say)
        stop.hold()
        with (
            locked(config.run_dir),
            jax.set_mesh(mesh),
            nn.logical_axis_rules(RULES),
            contextlib.closing(
                Checkpoints(config.run_dir, keep_last=config.keep_last)
            ) as checkpoints,
            contextlib.closing(metrics.MetricsLog(config.run_dir)) as log,
        ):
            state, position = restore_or_init(config, abstract, checkpoints, corpus, log)
            record_run(config, corpus.tokenizer)
            stop.release()
            step = int(state.step)
            num_steps = count_steps(config, corpus, step=step, position=position)
            announce(config, corpus, num_steps, mesh, log)
            run = Run(
                config,
                corpus,
                samples,
                mesh,
                num_steps,
                step=step,
                position=position,
                checkpoints=checkpoints,
                log=log,
            )
            run.catch_up(state)
            if step < num_steps:
                step_fn = compile_step(config, num_steps, mesh, abstract, log)
                state, interrupted = run.loop(step_fn, state, stop)
            else:
                log.say(f"the run is complete at update {step}; raise num_steps to go on")
                interrupted = False
            stop.hold()
        processes.gather()  # the log is written
        step = int(state.step)
        history = metrics.read_metrics(config.run_dir, up_to=step)
        return TrainResult(config, state.params, corpus.tokenizer, history, step, interrupted)


def announce(config: TrainConfig, corpus: Corpus, num_steps: int, mesh: Mesh, log) -> None:
    """The first lines of a run."""
    per_update = config.batch_size * config.data.seq_len
    train_tokens = sum(files.train_tokens for files in corpus.sources)
    devices = mesh.devices.ravel()
    log.say(
        f"{num_steps:,} updates of {per_update:,} tokens ({config.batch_size} sequences of "
        f"{config.data.seq_len}, {spread_rows(config, mesh).accumulate_steps} micro-batches) = "
        f"{num_steps * per_update / train_tokens:.2f} epochs of {metrics.count(train_tokens)} "
        "tokens"
    )
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    unused = jax.device_count() - devices.size
    log.say(
        f"{devices.size} x {devices[0].device_kind} ({devices[0].platform}); mesh {axes}"
        + (f"; {unused} more devices are not used" if unused else "")
    )


def restore_or_init(
    config: TrainConfig, abstract: TrainState, checkpoints: Checkpoints, corpus: Corpus, log
) -> tuple[TrainState, int]:
    """The state to go on from, and the samples already consumed. Never two states in memory."""
    shardings = jax.tree.map(lambda a: a.sharding, abstract)
    optimizer = any_length_optimizer(config)
    found = checkpoints.restore(split_state(abstract), report=log.say)
    if found is not None:
        log.say(f"resuming from update {found['step']} in {config.run_dir}")
        return join_state(found), resumed_position(found["position"], config, corpus, log)
    if config.init_from:
        source = read_config(config.init_from).model
        source = dataclasses.replace(config.model, param_dtype=source.param_dtype)
        step, params = read_params(config.init_from, source, shardings=shardings.params)
        log.say(f"starting from the weights of {config.init_from} at update {step}")
        dtype = config.model.param_dtype
        params = jax.tree.map(lambda p: p.astype(dtype), params)
        fresh = jax.jit(
            functools.partial(state_from_params, optimizer=optimizer),
            out_shardings=shardings,
            donate_argnums=0,
        )
        return fresh(params), 0
    log.say(f"starting from random weights, seed {config.seed}, in {config.run_dir}")
    fresh = jax.jit(
        functools.partial(init_state, config=config, optimizer=optimizer), out_shardings=shardings
    )
    return fresh(jax.random.key(config.seed)), 0


def resumed_position(saved: dict[str, Any], config: TrainConfig, corpus: Corpus, log) -> int:
    """The samples consumed, counted in this run's windows; says what changed about the data."""
    if saved["data"] != corpus.fingerprint:
        log.say("the training data changed since; its order is taken up at the same position")
    if saved["seq_len"] == config.data.seq_len:
        return saved["samples_seen"]
    log.say(
        f"data.seq_len was {saved['seq_len']}: the new windows are read from the same number of "
        "tokens on, in an order of their own"
    )
    return saved["samples_seen"] * saved["seq_len"] // config.data.seq_len


class Run:
    """The loop of one run and what it does on the side: log, save, evaluate, sample."""

    def __init__(
        self, config, corpus, samples, mesh, num_steps, *, step, position, checkpoints, log
    ):
        self.config, self.corpus, self.samples = config, corpus, samples
        self.mesh, self.num_steps = mesh, num_steps
        self.start_step, self.start_position = step, position
        self.checkpoints, self.log = checkpoints, log
        self.timer = metrics.StepTimer()
        self.nonfinite_in_a_row = 0
        device = jax.devices()[0]
        flops = 3 * metrics.flops_per_token(config.model, config.data.seq_len)
        peak = metrics.peak_flops(device)
        self.mfu_per_token_rate = flops / (peak * mesh.size) if peak else None

    def loop(self, step_fn, state: TrainState, stop: StopRequest) -> tuple[TrainState, bool]:
        """Updates until the end, or until asked to stop; returns the state and whether asked."""
        c, last = self.config, self.num_steps
        batches = data.training_batches(
            self.samples,
            position=self.start_position,
            batch_size=c.batch_size,
            rows=local_rows(self.mesh, c.batch_size),
            num_batches=last - self.start_step,
        )
        placed = (place(self.mesh, batch) for batch in batches)
        pending, any_stop = None, any_process(self.mesh)
        stop.enter_loop()
        self.timer.start(self.start_step)
        for step, batch in enumerate(self.timer.inputs(placed), start=self.start_step + 1):
            state, results = step_fn(state, batch)
            if pending:  # fetched one update late, so that the device never waits for us
                self.record(state, *pending)
            pending, stopping = (step, results), any_stop(stop.requested is not None)
            save = step == last or stopping or _due(step, c.save_every)
            side = {
                self.evaluate: step == last or _due(step, c.eval_every),
                self.sample: _due(step, c.sample_every),
            }
            if not (save or any(side.values())):
                continue
            self.record(state, *pending)
            pending = None
            if save:  # before anything that could fail
                self.save(state, step)
            if stopping:
                self.checkpoints.wait()
                self.log.say(f"stopped at update {step} as asked, and saved")
                return state, True
            for action, due in side.items():
                if due:
                    action(state, step)
            self.timer.start(step)
        self.checkpoints.wait()  # still catching signals: the last save must not be lost
        return state, False

    def record(self, state: TrainState, step: int, results: dict[str, jax.Array]) -> None:
        """Looks at the results of an update; logs it where it is due."""
        c = self.config
        values = {name: value.item() for name, value in jax.device_get(results).items()}
        loss, finite = values["loss"], values.pop("finite")
        self.nonfinite_in_a_row = 0 if finite else self.nonfinite_in_a_row + 1
        if not finite:
            self.log.say(
                f"update {step} skipped: loss {loss}, gradient norm {values['grad_norm']} "
                f"({values['skipped']} skipped so far)"
            )
        if self.nonfinite_in_a_row >= c.max_nonfinite_steps:
            self.save(state, int(state.step))
            self.checkpoints.wait()
            raise Diverged(
                f"{self.nonfinite_in_a_row} updates in a row, up to update {step}, had a "
                f"non-finite loss or gradient (max_nonfinite_steps={c.max_nonfinite_steps}); the "
                f"parameters before them are saved in {c.run_dir}. Lower optim.learning_rate or "
                "look at the data"
            )
        self.log.progress(step, self.num_steps, loss)
        if not (step == 1 or step == self.num_steps or _due(step, c.log_every)):
            return
        seconds, input_wait = self.timer.lap(step)
        rate = c.batch_size * c.data.seq_len / seconds
        left = seconds * (self.num_steps - step)
        record = {
            "step": step,
            "loss": loss,
            "perplexity": metrics.perplexity(loss),
            "learning_rate": values["learning_rate"],
            "grad_norm": values["grad_norm"],
            "seconds_per_step": seconds,
            "tokens_per_second": rate,
            "input_wait": input_wait,
            "seconds_left": left,
            "samples_seen": self.position(step),
            "skipped": values["skipped"],
        }
        line = (
            f"update {step}/{self.num_steps}  loss {loss:.4f}  ppl {record['perplexity']:.2f}  "
            f"lr {values['learning_rate']:.2e}  grad {values['grad_norm']:.3f}  "
            f"{1000 * seconds:.0f} ms  {metrics.count(rate)} tok/s"
        )
        if self.mfu_per_token_rate:
            record["mfu"] = rate * self.mfu_per_token_rate
            line += f"  MFU {100 * record['mfu']:.1f}%"
        if input_wait > 0.01:
            line += f"  {100 * input_wait:.0f}% waiting for data"
        if values["skipped"]:
            line += f"  {values['skipped']} skipped"
        self.log.write(record, f"{line}  {metrics.duration(left)} left")

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

    def evaluate(self, state: TrainState, step: int) -> Evaluation | None:
        """Validation loss, logged, and noted if the step is saved. None without validation text."""
        c = self.config
        if sum(files.validation_tokens for files in self.corpus.sources) == 0:
            return None
        micro_batches = spread_rows(c, self.mesh).accumulate_steps
        batches = data.eval_batches(
            self.corpus,
            seq_len=c.data.seq_len,
            batch_size=c.batch_size // micro_batches,
            max_sequences=c.eval_sequences,
        )
        result = evaluate(
            c.model,
            state.params,
            batches,
            place=lambda array: place(self.mesh, array[local_rows(self.mesh, len(array))]),
        )
        record = {
            "step": step,
            "validation_loss": result.loss,
            "validation_perplexity": result.perplexity,
            "validation_bits_per_byte": result.bits_per_byte,
        }
        self.log.write(
            record,
            f"update {step}/{self.num_steps}  validation loss {result.loss:.4f}  "
            f"ppl {result.perplexity:.2f}  {result.bits_per_byte:.4f} bits/byte  "
            f"({result.tokens:,} tokens)",
        )
        if self.checkpoints.latest_step() == step:
            basis = f"{self.corpus.fingerprint}/{c.data.seq_len}/{c.eval_sequences}"
            self.checkpoints.note_validation(step, result.loss, basis=basis)
        return result

    def sample(self, state: TrainState, step: int) -> None:
        """Prints a continuation of the sample prompt."""
        c = self.config
        model = LanguageModel(c.model, state.params, self.corpus.tokenizer)
        with nn.logical_axis_rules(()):  # one row cannot be split over devices
            text = model.generate(
                c.sample_prompt, max_new_tokens=c.sample_tokens, temperature=0.8, seed=step
            )
        self.log.say(f"sample at update {step}: {c.sample_prompt}{text}")

    def catch_up(self, state: TrainState) -> None:
        """On resuming: the validation loss of the saved update, if a stop or a crash took it."""
        step = self.start_step
        due = step > 0 and (step == self.num_steps or _due(step, self.config.eval_every))
        records = metrics.read_metrics(self.config.run_dir, up_to=step)
        missing = not any(r["step"] == step and "validation_loss" in r for r in records)
        if due and processes.gather(str(missing))[0] == "True":  # one reading of the file for all
            self.evaluate(state, step)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def train_inl_llm(
    data_path: str | Path | Sequence[str],
    model_size: str = "small",
    num_epochs: float = 3,
    batch_size: int = 8,
    learning_rate: float = 3e-4,
    max_samples: int | None = None,
    save_dir: str = "runs/inl_llm",
    device: str = "auto",
) -> tuple[LanguageModel, Tokenizer, list[dict[str, Any]]]:
    """The published guide's entry point, over `train`.

    Args:
      data_path: a source as in `DataConfig.paths`, or several.
      model_size: a config that comes with the project: tiny, small, ..., 3b, 4b.
      num_epochs: passes over the training tokens.
      batch_size: sequences per update.
      learning_rate: peak learning rate.
      max_samples: documents to read; None reads all.
      save_dir: the run directory; a second call goes on from it.
      device: "auto", or the one that must be there: "cpu", "cuda" (or "gpu").

    Returns:
      The model (its `generate` continues text), its tokenizer, and the log records.

    Raises:
      InputError: as `train` does, and where `device` is not what JAX runs on.
    """
    wanted = {"auto": jax.default_backend(), "cuda": "gpu"}.get(device, device)
    if wanted != jax.default_backend():
        raise InputError(
            f"device={device}: JAX runs on {jax.default_backend()} here; install inl_jax[cuda] for "
            "a GPU, set JAX_PLATFORMS=cpu for the CPU, or pass device='auto'"
        )
    base, one = load_config(model_size), isinstance(data_path, str | Path)
    config = dataclasses.replace(
        base,
        data=dataclasses.replace(
            base.data,
            paths=(str(data_path),) if one else tuple(map(str, data_path)),
            max_documents=max_samples or 0,
        ),
        optim=dataclasses.replace(base.optim, learning_rate=learning_rate, warmup_steps=0),
        num_steps=0,
        num_epochs=num_epochs,
        batch_size=batch_size,
        accumulate_steps=1,
        run_dir=save_dir,
    )
    # The config's warmup, where the run is long enough for it. Preparing is cached, so cheap here.
    num_steps = count_steps(config, prepare(config.data))
    warmup = min(base.optim.warmup_steps, num_steps // 10)
    config = dataclasses.replace(
        config, optim=dataclasses.replace(config.optim, warmup_steps=warmup)
    )
    result = train(config)
    return result.model, result.tokenizer, result.history
