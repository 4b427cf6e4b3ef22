"""Trains the runs of a study, several at a time, and reads what they found.

A run is a model at a width on a corpus, with a learning rate and a seed. Runs of as many updates
read the same tokens.
"""

import functools
import json
import multiprocessing
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from corpora import corpus_paths
from forms import FORMS, Form

from inl_jax.config import TrainConfig, with_fields
from inl_jax.config_file import load_config
from inl_jax.console import say
from inl_jax.data.batches import eval_batches, training_batches, training_samples
from inl_jax.data.corpus import prepare
from inl_jax.evaluation import evaluate
from inl_jax.files import write_text
from inl_jax.limits import usable_cpus
from inl_jax.model.language_model import init_params, param_count
from inl_jax.training.optim import apply_gradients, init_optimizer, learning_rates, make_optimizer
from inl_jax.training.step import loss_fn

SEQ_LEN, ROWS = 256, 4
BASE = (  # overrides of configs/tiny.py
    *("model.vocab_size=1024", "data.tokenizer=bpe:1024", f"data.seq_len={SEQ_LEN}"),
    *(f"batch_size={ROWS}", "optim.warmup_steps=50", "data.validation_fraction=0.02"),
)
WIDTHS = {  # sizes at a width
    128: {"model.d_model": 128, "model.num_heads": 4, "model.num_kv_heads": 2},
    256: {"model.d_model": 256, "model.num_heads": 8, "model.num_kv_heads": 4},
}
UPDATES = 1000


class Arm(NamedTuple):
    """A model of the study."""

    name: str
    fields: tuple[tuple[str, Any], ...]  # dotted fields of the config; model.d_ff in widths
    form: str = ""  # of `FORMS`


class Run(NamedTuple):
    """An arm, trained once."""

    arm: Arm
    width: int
    corpus: str
    learning_rate: float
    seed: int
    updates: int = UPDATES

    @property
    def path(self) -> str:
        """Where its result is, below the directory of all runs."""
        arm = self.arm.name.replace(" ", "_").replace("/", "")
        name = f"rate{self.learning_rate:g}-seed{self.seed}"
        name += f"-updates{self.updates}" if self.updates != UPDATES else ""
        return f"{self.width}/{self.corpus}/{arm}/{name}"

    def config(self, runs_dir: str) -> TrainConfig:
        """The run, with its corpus below `runs_dir`."""
        fields = {
            **WIDTHS[self.width],
            **dict(self.arm.fields),
            "data.paths": corpus_paths(self.corpus, Path(runs_dir, "corpora")),
            "optim.learning_rate": self.learning_rate,
            "seed": self.seed,
            "num_steps": self.updates,
        }
        fields["model.d_ff"] = round(fields["model.d_ff"] * self.width)
        return with_fields(load_config("tiny", BASE), fields)


class Result(NamedTuple):
    """What a run found."""

    bits_per_byte: float  # of the whole validation split
    by_depth: dict[str, float]  # the same with other numbers of iterations
    parameters: int
    flops: float  # of the training
    seconds: float  # of the training, without compilation; other work may have slowed it
    losses: list[float]  # of the training, means over 20ths of the run, nats per token


def flops_of_update(config: TrainConfig, form: Form) -> float:
    """FLOPs of an update's matrix products, forward and backward."""
    return 3 * form.flops(config.model, SEQ_LEN) * SEQ_LEN * ROWS


def train_run(run: Run, runs_dir: str, *, depths: Iterable[int] = ()) -> Result:
    """Trains a run from its beginning to its end, as `inl train` does on one device.

    Args:
      run: what to train.
      runs_dir: the directory of all runs and of the corpora.
      depths: numbers of iterations to evaluate it with, beside its own.
    """
    config, form = run.config(runs_dir), FORMS[run.arm.form]
    corpus, optimizer = prepare(config.data), make_optimizer(config)
    params = jax.tree.map(jnp.copy, form.init(init_params(config.model, jax.random.key(run.seed))))
    state = params, init_optimizer(optimizer, params)
    rates, losses, start = learning_rates(config.optim, config.num_steps), [], 0.0

    @functools.cache
    def with_iterations(num_iterations: int) -> TrainConfig:
        return with_fields(config, {"model.num_iterations": num_iterations})

    samples = training_samples(corpus, config.data, config.seed)
    batches = training_batches(
        samples, position=0, batch_size=ROWS, rows=slice(0, ROWS), num_batches=config.num_steps
    )
    for update, batch in enumerate(batches):
        step = with_iterations(form.depth(config.model, update))
        state, loss = _update(step, run.arm.form, *state, batch, rates[update])
        losses.append(loss)
        if update == 0:  # which compiles
            loss.block_until_ready()
            start = time.perf_counter()
    jax.block_until_ready(state)
    seconds = time.perf_counter() - start

    def bits(num_iterations: int) -> float:
        windows = eval_batches(corpus, seq_len=SEQ_LEN, batch_size=16)
        return evaluate(with_iterations(num_iterations).model, state[0], windows).bits_per_byte

    part = max(1, len(losses) // 20)
    parts = [jnp.stack(losses[i : i + part]) for i in range(0, len(losses), part)]
    return Result(
        bits_per_byte=bits(config.model.num_iterations),
        by_depth={str(t): bits(t) for t in depths},
        parameters=param_count(config.model),
        flops=config.num_steps * flops_of_update(config, form),
        seconds=seconds,
        losses=[float(jnp.mean(losses)) for losses in parts],
    )


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def _update(config: TrainConfig, form: str, params, opt_state, batch_BL, learning_rate):
    """One update of parameters and optimizer state, and its loss."""

    def loss(params):
        found = loss_fn(params, batch_BL, None, config=config)
        return found + FORMS[form].penalty(config.model, params, batch_BL[:, :-1]), found

    grads, found = jax.grad(loss, has_aux=True)(params)
    grads = FORMS[form].tie(grads)
    scale = jnp.minimum(1, config.optim.clip_norm / optax.tree.norm(grads))
    state = apply_gradients(
        make_optimizer(config), grads, opt_state, params, learning_rate=learning_rate, scale=scale
    )
    return state, found


# --- many runs


def train_runs(runs: Iterable[Run], runs_dir: str, *, depths: Mapping[str, Iterable[int]]) -> None:
    """Trains the runs that have no result yet: one on each CPU, or one at a time on a GPU.

    Args:
      runs: what to train, in order.
      runs_dir: where results are, one JSON file a run.
      depths: by the name of an arm, the numbers of iterations to evaluate it with.
    """
    missing = [run for run in dict.fromkeys(runs) if not _file(run, runs_dir).exists()]
    for run in missing:  # before any training: what is impossible, and the corpora
        run.config(runs_dir)
    jobs = [(run, runs_dir, tuple(depths.get(run.arm.name, ()))) for run in missing]
    if jax.default_backend() == "cpu":
        spawn, cpus = multiprocessing.get_context("spawn"), min(usable_cpus(), len(jobs) or 1)
        numbers = spawn.Queue()
        for cpu in range(cpus):
            numbers.put(cpu)
        with spawn.Pool(cpus, _pin, (numbers,)) as pool:
            _say_each(pool.imap_unordered(_train_and_write, jobs), len(jobs))
    else:  # one run at a time has the whole accelerator
        _say_each(map(_train_and_write, jobs), len(jobs))


def _say_each(lines: Iterable[str], total: int) -> None:
    for done, line in enumerate(lines, start=1):
        say(f"{done}/{total}  {line}")


def read_result(run: Run, runs_dir: str) -> Result | None:
    """What a run found; None if it has not ended."""
    file = _file(run, runs_dir)
    return Result(**json.loads(file.read_text())) if file.exists() else None


def _file(run: Run, runs_dir: str) -> Path:
    return Path(runs_dir, f"{run.path}.json")


def _pin(numbers) -> None:
    """Gives this process a CPU of its own."""
    cpu = numbers.get()
    if hasattr(os, "sched_setaffinity"):  # not on macOS
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[cpu]})


def _train_and_write(job) -> str:
    run, runs_dir, depths = job
    result = train_run(run, runs_dir, depths=depths)
    file = _file(run, runs_dir)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(result._asdict()))
    return f"{result.bits_per_byte:.4f} bits per byte, {result.seconds:.0f} s: {run.path}"
