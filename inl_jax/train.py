"""Training: a pure `train_step`, and `train(config)`, the loop round it."""

import contextlib
import dataclasses
import functools
import hashlib
import math
import re
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from inl_jax import data, metrics, processes
from inl_jax.checkpoint import (
    Checkpoints,
    check_run,
    locked,
    read_config,
    read_params,
    record_run,
)
from inl_jax.config import InputError, TrainConfig, differences, from_json, load, to_json
from inl_jax.corpus import Corpus, make_cache, prepare
from inl_jax.evaluate import Evaluation, evaluate
from inl_jax.generate import LanguageModel
from inl_jax.losses import mean_loss
from inl_jax.memory import memory_found, memory_needed
from inl_jax.model import (
    abstract_params,
    attention_kernel,
    compute_dtype,
    hidden_states,
    init_params,
    param_count,
)
from inl_jax.optim import (
    accumulator_dtype,
    any_length_optimizer,
    apply_gradients,
    init_optimizer,
    learning_rate_schedule,
    make_optimizer,
    round_tree,
)
from inl_jax.sharding import (
    RULES,
    abstract_optimizer_state,
    any_process,
    check_rows,
    local_rows,
    make_mesh,
    param_shardings,
    place,
    rows,
)
from inl_jax.tokenizer import Tokenizer
from inl_jax.xla import Program, compile_for_cuda

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: saved; the same command goes on from there
EXIT_DIVERGED = 3


class TrainState(NamedTuple):
    """All that training changes."""

    step: jax.Array  # updates tried, int32
    skipped: jax.Array  # of them, those left out because something was not finite
    params: Any
    opt_state: Any


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


# --- pure functions


def loss_fn(params, batch_BS, dropout_key, *, config: TrainConfig) -> jax.Array:
    """Mean next-token loss of sequences [B, S + 1], float32."""
    dropout_key = dropout_key if config.model.dropout > 0 else None
    hidden = hidden_states(config.model, params, batch_BS[:, :-1], dropout_key=dropout_key)
    return mean_loss(params, hidden, batch_BS[:, 1:], chunk=config.loss_chunk)


def init_state(key: jax.Array, *, config: TrainConfig, optimizer) -> TrainState:
    """The state before the first update."""
    return state_from_params(init_params(config.model, key), optimizer=optimizer)


def state_from_params(params, *, optimizer) -> TrainState:
    """The state before the first update, from given parameters."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, zero, params, init_optimizer(optimizer, params))


def gradients(params, batch_BS, key, *, config: TrainConfig, shardings=None):
    """Loss and gradients of a batch, the means over its micro-batches.

    The rows are dealt to `accumulate_steps` micro-batches in turn, so that each device keeps its
    own. `optax.MultiSteps` takes the mean. It is set to emit one micro-batch later than
    there are any, and its mean is read from its state: this way it wraps no optimizer, which it
    would run for every micro-batch and whose old state it would hold beside the new.

    Args:
      params: the parameters.
      batch_BS: tokens, int32 [batch_size, S + 1].
      key: for dropout.
      config: the run.
      shardings: where gradients lie, one for each parameter.

    Returns:
      (loss, gradients): these in the type of the parameters, or `accumulator_dtype` where added up.
    """

    def one(batch_BS, i):
        loss, grads = jax.value_and_grad(loss_fn)(
            params, batch_BS, jax.random.fold_in(key, i), config=config
        )
        return loss, place_tree(grads)

    def place_tree(tree):
        return tree if shardings is None else jax.lax.with_sharding_constraint(tree, shardings)

    k = config.accumulate_steps
    micro_kBS = batch_BS.reshape(-1, k, batch_BS.shape[-1]).swapaxes(0, 1)
    if k == 1:
        return one(micro_kBS[0], 0)
    wide = jnp.promote_types(jnp.float32, config.model.param_dtype)
    mean = optax.MultiSteps(optax.identity(), k + 1, accumulator_dtype=wide)

    def add(state, inputs):
        loss, grads = one(*inputs)
        held = state.acc_grads
        state = state._replace(acc_grads=optax.tree.cast(held, wide))
        state = mean.update(optax.tree.cast(grads, wide), state)[1]
        rounded = round_tree(jax.random.fold_in(key, k + 1 + inputs[1]), state.acc_grads, held)
        return state._replace(acc_grads=place_tree(rounded)), loss

    state = mean.init(params)
    state = state._replace(acc_grads=optax.tree.cast(state.acc_grads, accumulator_dtype(config)))
    state, losses = jax.lax.scan(add, state, (micro_kBS, jnp.arange(k)))
    return losses.mean(), state.acc_grads


def train_step(
    state: TrainState, batch_BS, *, config: TrainConfig, optimizer, schedule, shardings=None
):
    """One optimizer update.

    A non-finite loss or gradient norm leaves parameters and optimizer as they were.

    Args:
      state: the state, to be donated.
      batch_BS: tokens, int32 [batch_size, S + 1].
      config: the run.
      optimizer: from `make_optimizer`.
      schedule: its learning rate by update, for the record.
      shardings: where gradients lie, one for each parameter; left to XLA without.

    Returns:
      The new state and scalar metrics: loss, grad_norm, learning_rate, finite, skipped.
    """
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    loss, grads = gradients(state.params, batch_BS, key, config=config, shardings=shardings)
    grad_norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(loss.dtype), grads))
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    params, opt_state = apply_gradients(
        optimizer, grads, state.opt_state, state.params,
        scale=jnp.minimum(1, config.optim.clip_norm / grad_norm), keep=~finite,
        key=jax.random.fold_in(key, config.accumulate_steps),
    )  # fmt: skip
    skipped = state.skipped + jnp.where(finite, 0, 1)
    results = {
        "loss": loss,
        "grad_norm": grad_norm,
        "learning_rate": schedule(state.step - state.skipped),
        "finite": finite,
        "skipped": skipped,
    }
    return TrainState(state.step + 1, skipped, params, opt_state), results


# --- the run


def train(config: TrainConfig) -> TrainResult:
    """Trains, or goes on with, the run that `config` describes; every process calls it alike.

    Raises:
      InputError: the config, the data, the machine or the run directory does not fit.
      Diverged: too many updates in a row were not finite. The state before them is saved.
    """
    mesh = make_mesh(config.mesh)
    check_same_config(config)
    abstract = abstract_state(config, mesh)
    check_machine(config, mesh, abstract, report=processes.say)
    corpus = prepare_everywhere(config)
    data.check(corpus, config.model.vocab_size)
    samples = data.training_samples(corpus, config.data, config.seed)
    check_sample(config, corpus.tokenizer)
    count_steps(config, corpus)
    check_run(config, corpus.tokenizer, report=processes.say)
    with (
        locked(config.run_dir),
        jax.set_mesh(mesh),
        nn.logical_axis_rules(RULES),
        contextlib.closing(Checkpoints(config.run_dir, keep_last=config.keep_last)) as checkpoints,
        contextlib.closing(metrics.MetricsLog(config.run_dir)) as log,
    ):
        state, position = restore_or_init(config, abstract, checkpoints, corpus, log)
        record_run(config, corpus.tokenizer)
        step = int(state.step)
        num_steps = count_steps(config, corpus, step=step, position=position)
        announce(config, corpus, num_steps, mesh, log)
        run = Run(
            config, corpus, samples, mesh, num_steps, step=step, position=position,
            checkpoints=checkpoints, log=log,
        )  # fmt: skip
        run.catch_up(state)
        if step < num_steps:
            step_fn = compile_step(config, num_steps, mesh, abstract, log)
            state, interrupted = run.loop(step_fn, state)
        else:
            log.say(f"the run is complete at update {step}; raise num_steps to go on")
            interrupted = False
    processes.gather()  # the log is written
    step = int(state.step)
    history = metrics.read_metrics(config.run_dir, up_to=step)
    return TrainResult(config, state.params, corpus.tokenizer, history, step, interrupted)


def check_same_config(config: TrainConfig) -> None:
    """Raises `InputError` where the processes were not started with the same config."""
    mine = to_json(config)
    if len(set(processes.gather(hashlib.sha256(mine.encode()).hexdigest()))) == 1:
        return
    first, *others = map(from_json, processes.gather(mine))
    i, other = next((i, c) for i, c in enumerate(others, start=1) if c != first)
    field, expected, found = next(differences(first, other))
    raise InputError(
        f"{field}={found} on process {i} and {expected} on process 0: start all with the same "
        "command and config file"
    )


def prepare_everywhere(config: TrainConfig) -> Corpus:
    """The same corpus on every process, whether their hosts share the cache or not.

    Raises:
      InputError: as `prepare` does, and where the processes found different data.
    """
    corpus = processes.once_for_each_copy(
        make_cache(config.data.cache_dir), lambda: prepare(config.data, report=processes.say)
    )
    processes.check_same(
        "the fingerprint of the data", f"{corpus.fingerprint}/{corpus.tokenizer.fingerprint}",
        "data.paths and data.tokenizer must name the same files on every host",
    )  # fmt: skip
    return corpus


def check_machine(config: TrainConfig, mesh: Mesh, abstract: TrainState, *, report=print) -> None:
    """Says what the run needs and what is here, before anything is allocated.

    Args:
      config: the run.
      mesh: its devices.
      abstract: its state, from `abstract_state`.
      report: where the lines go.

    Raises:
      InputError: the devices, the memory or the disk do not suffice.
    """
    report(describe_model(config))
    check_rows(config, mesh)
    needed, (found, what) = memory_needed(config, mesh), memory_found(mesh)
    total = needed.device_bytes
    parts = ", ".join(f"{part} {metrics.gib(size)}" for part, size in needed.device.items() if size)
    report(
        f"memory on each of {mesh.size} devices: needs {metrics.gib(total)} ({parts}); found "
        f"{metrics.gib(found)} ({what})"
    )
    if total > found:
        raise InputError(
            f"{config.name} needs {metrics.gib(total)} of memory on each device and "
            f"{metrics.gib(found)} was found: scripts/estimate.py names the smallest change that "
            "makes it fit; else lower batch_size or data.seq_len, raise accumulate_steps, or raise "
            "mesh.fsdp with more devices"
        )
    existing = next(p for p in (Path(config.run_dir).absolute() / "x").parents if p.exists())
    free = shutil.disk_usage(existing).free
    checkpoint = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(abstract))
    if 2 * checkpoint > free:
        raise InputError(
            f"run_dir={config.run_dir} has {metrics.gib(free)} free and one checkpoint takes "
            f"{metrics.gib(checkpoint)}, of which two exist while one is replaced: free some disk "
            "or choose another run_dir"
        )


def describe_model(config: TrainConfig) -> str:
    """Name, true parameter count and shape in one line."""
    m, n = config.model, param_count(config.model)
    kernel = f" ({attention_kernel(m)} kernel)" if m.context == "attention" else ""
    return (
        f"{config.name}: {n:,} parameters ({metrics.count(n)}), {m.context} context{kernel}, "
        f"{m.num_layers} layers x {m.num_iterations} iterations, width {m.d_model}, "
        f"parameters {m.param_dtype}, matrix products {compute_dtype(m).name}"
    )


def count_steps(config: TrainConfig, corpus: Corpus, *, step: int = 0, position: int = 0) -> int:
    """Updates in the run: `num_steps`, or those that `num_epochs` makes.

    Args:
      config: the run.
      corpus: its data.
      step: updates already done.
      position: the samples they consumed, perhaps at another batch size.

    Raises:
      InputError: the epochs are shorter than the warmup.
    """
    if config.num_steps > 0:
        return config.num_steps
    windows = sum(data.count_windows(files, config.data.seq_len) for files in corpus.sources)
    left = math.floor(config.num_epochs * windows) - position
    num_steps = max(1, step + max(0, left // config.batch_size))
    if config.optim.warmup_steps >= num_steps:
        raise InputError(
            f"optim.warmup_steps={config.optim.warmup_steps}: num_epochs={config.num_epochs} makes "
            f"only {num_steps} updates of {config.batch_size} sequences; lower the warmup"
        )
    return num_steps


def check_sample(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Raises `InputError` where the printed samples would be too long for the model."""
    longest = len(tokenizer.encode(config.sample_prompt)) + config.sample_tokens
    if config.sample_every > 0 and longest > config.model.max_seq_len:
        raise InputError(
            f"sample_tokens={config.sample_tokens}: with the prompt that is {longest} tokens, "
            f"beyond model.max_seq_len={config.model.max_seq_len}; lower sample_tokens"
        )


def announce(config: TrainConfig, corpus: Corpus, num_steps: int, mesh: Mesh, log) -> None:
    """The first lines of a run."""
    per_update = config.batch_size * config.data.seq_len
    train_tokens = sum(files.train_tokens for files in corpus.sources)
    devices = mesh.devices.ravel()
    log.say(
        f"{num_steps:,} updates of {per_update:,} tokens ({config.batch_size} sequences of "
        f"{config.data.seq_len}, {config.accumulate_steps} micro-batches) = "
        f"{num_steps * per_update / train_tokens:.2f} epochs of {metrics.count(train_tokens)} "
        "tokens"
    )
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    unused = jax.device_count() - devices.size
    log.say(
        f"{devices.size} x {devices[0].device_kind} ({devices[0].platform}); mesh {axes}"
        + (f"; {unused} more devices are not used" if unused else "")
    )


def abstract_state(config: TrainConfig, mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of the state, without allocating."""
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    params = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        abstract_params(config.model),
        param_shardings(mesh, config.model, fsdp_shards=config.mesh.fsdp_shards),
    )
    return TrainState(scalar, scalar, params, abstract_optimizer_state(config, mesh))


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
            out_shardings=shardings, donate_argnums=0,
        )  # fmt: skip
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


def split_state(state: TrainState) -> dict[str, Any]:
    """A state as a checkpoint holds it: the parameters apart from the rest."""
    rest = state._asdict()
    return {"params": rest.pop("params"), "optimizer": rest}


def join_state(found: dict[str, Any]) -> TrainState:
    """The inverse of `split_state`."""
    return TrainState(params=found["params"], **found["optimizer"])


def trace_step(config: TrainConfig, num_steps: int, mesh: Mesh, abstract: TrainState):
    """`train_step` traced for this run, its state donated; `abstract` is from `abstract_state`."""
    batch = jax.ShapeDtypeStruct(
        (config.batch_size, config.data.seq_len + 1), jnp.int32, sharding=rows(mesh)
    )
    schedule = learning_rate_schedule(config, num_steps)
    step_fn = functools.partial(
        train_step, config=config, optimizer=make_optimizer(config, num_steps), schedule=schedule,
        shardings=param_shardings(mesh, config.model),
    )  # fmt: skip
    shardings = jax.tree.map(lambda a: a.sharding, abstract)
    jitted = jax.jit(step_fn, donate_argnums=0, out_shardings=(shardings, NamedSharding(mesh, P())))
    return jitted.trace(abstract, batch)


def compile_abstractly(config: TrainConfig, mesh: Mesh, compiler: str) -> Program:
    """A training step compiled for the devices of `mesh`; nothing is allocated and nothing runs.

    Args:
      config: the run.
      mesh: of CPU devices.
      compiler: "cpu", or "cuda" for as many H100s.
    """
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        num_steps = config.num_steps or config.optim.warmup_steps + 1
        traced = trace_step(config, num_steps, mesh, abstract_state(config, mesh))
        if compiler == "cuda":
            return compile_for_cuda(traced, mesh.size)
        compiled = traced.lower().compile()
    return Program(compiled.memory_analysis(), compiled.as_text())


def compile_step(config: TrainConfig, num_steps: int, mesh: Mesh, abstract: TrainState, log):
    """The training step compiled for this run, and what it was compiled to checked.

    Raises:
      RuntimeError: cuDNN attention was asked for and is not in it.
    """
    start = time.perf_counter()
    log.say("compiling the training step ...")
    compiled = trace_step(config, num_steps, mesh, abstract).lower().compile()
    log.say(f"compiled in {time.perf_counter() - start:.1f} s")
    memory, held = compiled.memory_analysis(), state_bytes(abstract)
    in_place = memory.alias_size_in_bytes + memory.host_alias_size_in_bytes
    if in_place < held:
        log.say(
            f"WARNING: only {metrics.gib(in_place)} of the state's {metrics.gib(held)} on each "
            "device is updated in place; the rest is held twice"
        )
    if config.optim.state_memory == "pinned_host":
        check_offload(compiled.as_text())
    if config.model.context == "attention" and attention_kernel(config.model) == "cudnn":
        check_fused_attention(compiled.as_text())
    return compiled


def state_bytes(abstract: TrainState) -> int:
    """Bytes of the state on each device."""
    return sum(
        math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
        for a in jax.tree.leaves(abstract)
    )


def check_offload(program: str) -> None:
    """Raises `RuntimeError` where a compiled step holds nothing in host memory.

    Args:
      program: its text. XLA writes arrays in host memory with `S(5)` in their layout.
    """
    layout = re.search(r"entry_computation_layout=.*", program)
    if layout is None or layout[0].count("S(5)") < 2:  # once coming in, once going out
        raise RuntimeError(
            "optim.state_memory=pinned_host: the compiled step keeps no state in host memory; this "
            "platform does not support it, set optim.state_memory=device"
        )


def check_fused_attention(program: str) -> None:
    """Raises `RuntimeError` where a step lacks cuDNN's attention kernel, forward or backward.

    Args:
      program: its text, as StableHLO or as compiled.
    """
    kernels = set(re.findall(r"__cudnn\$fmha\w+", program))
    missing = [
        direction
        for direction, backward in (("forward", False), ("backward", True))
        if not any(("Backward" in kernel) == backward for kernel in kernels)
    ]
    if missing:
        raise RuntimeError(
            f"the compiled step lacks cuDNN's attention kernel in its {' and '.join(missing)} pass "
            f"(found: {', '.join(sorted(kernels)) or 'none'}): report this, or set "
            "model.attention_kernel=xla to train without it"
        )


class StopRequest:
    """Catches SIGTERM and Ctrl-C for as long as it is open; a second Ctrl-C is not caught."""

    def __init__(self):
        self.requested = False

    def __enter__(self) -> "StopRequest":
        self._old = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._catch)
        return self

    def _catch(self, number, frame):
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *exception):
        for number, handler in self._old.items():
            signal.signal(number, handler)


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

    def loop(self, step_fn, state: TrainState) -> tuple[TrainState, bool]:
        """Updates until the end, or until asked to stop; returns the state and whether asked."""
        c, last = self.config, self.num_steps
        batches = data.training_batches(
            self.samples, position=self.start_position, batch_size=c.batch_size,
            rows=local_rows(self.mesh, c.batch_size), num_batches=last - self.start_step,
        )  # fmt: skip
        placed = (place(self.mesh, batch) for batch in batches)
        pending, any_stop = None, any_process(self.mesh)
        with StopRequest() as stop:
            self.timer.start(self.start_step)
            for step, batch in enumerate(self.timer.inputs(placed), start=self.start_step + 1):
                state, results = step_fn(state, batch)
                if pending:  # fetched one update late, so that the device never waits for us
                    self.record(state, *pending)
                pending, stopping = (step, results), any_stop(stop.requested)
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
            "step": step, "loss": loss, "perplexity": metrics.perplexity(loss),
            "learning_rate": values["learning_rate"], "grad_norm": values["grad_norm"],
            "seconds_per_step": seconds, "tokens_per_second": rate, "input_wait": input_wait,
            "seconds_left": left, "samples_seen": self.position(step),
            "skipped": values["skipped"],
        }  # fmt: skip
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
        batches = data.eval_batches(
            self.corpus, seq_len=c.data.seq_len, batch_size=c.batch_size // c.accumulate_steps,
            max_sequences=c.eval_sequences,
        )  # fmt: skip
        result = evaluate(
            c.model, state.params, batches,
            place=lambda array: place(self.mesh, array[local_rows(self.mesh, len(array))]),
        )  # fmt: skip
        record = {
            "step": step, "validation_loss": result.loss,
            "validation_perplexity": result.perplexity,
            "validation_bits_per_byte": result.bits_per_byte,
        }  # fmt: skip
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
    base, one = load(model_size), isinstance(data_path, str | Path)
    config = dataclasses.replace(
        base,
        data=dataclasses.replace(
            base.data,
            paths=(str(data_path),) if one else tuple(map(str, data_path)),
            max_documents=max_samples or 0,
        ),
        optim=dataclasses.replace(base.optim, learning_rate=learning_rate, warmup_steps=0),
        num_steps=0, num_epochs=num_epochs, batch_size=batch_size, accumulate_steps=1,
        run_dir=save_dir,
    )  # fmt: skip
    # The config's warmup, where the run is long enough for it. Preparing is cached, so cheap here.
    num_steps = count_steps(config, prepare(config.data))
    warmup = min(base.optim.warmup_steps, num_steps // 10)
    config = dataclasses.replace(
        config, optim=dataclasses.replace(config.optim, warmup_steps=warmup)
    )
    result = train(config)
    return result.model, result.tokenizer, result.history
