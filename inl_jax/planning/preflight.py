"""Before anything is allocated: the config fitted to its mesh, and checks of machine and data.

A check returns what it found, what is wanted and a verdict, or raises `InputError` or `DiskFull` if
the run cannot work. `train` ends at the first that raises; `checklist` makes all of them.
"""

import contextlib
import hashlib
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh

from inl_jax.config import InputError, TrainConfig
from inl_jax.config_file import differences, from_json, to_json
from inl_jax.console import count, duration, first_line, plural, say, size
from inl_jax.curriculum import make_curriculum
from inl_jax.data import batches as data
from inl_jax.data.corpus import Corpus, make_cache, prepare
from inl_jax.failures import DiskFull
from inl_jax.limits import host_memory
from inl_jax.model.language_model import param_count
from inl_jax.model.layers import compute_dtype
from inl_jax.model.mixers.attention import attention_kernel
from inl_jax.model.platform.kernels import check_kernels
from inl_jax.parallel import processes
from inl_jax.parallel.sharding import fit_to_mesh, make_mesh, on
from inl_jax.planning.budget import TOKENS_PER_PARAMETER, guide_minimum
from inl_jax.planning.memory import memory_found, memory_needed, shares_host
from inl_jax.planning.memory_advice import memory_advice
from inl_jax.planning.recipe import choose, explain, is_open, memory_of_each
from inl_jax.tokens.tokenizer import Tokenizer
from inl_jax.training.metrics import read_metrics
from inl_jax.training.state import Layout, make_layout

Verdict = Literal["ok", "not checked", "warning", "failed"]
Finding = tuple[str, str, Verdict]  # what was found, what is wanted


class Check(NamedTuple):
    """A line of the checklist."""

    name: str
    found: str
    wanted: str
    verdict: Verdict


class Plan(NamedTuple):
    """How a run will be laid out on this machine."""

    config: TrainConfig  # fitted to the mesh, without auto in its recipe
    mesh: Mesh
    layout: Layout


def plan_run(config: TrainConfig) -> tuple[Plan, str]:
    """Fits a run to its mesh, says what it needs and what this machine has. Nothing is allocated.

    Returns:
      How it will be laid out; and why so, in one line.

    Raises:
      InputError: the processes have different configs, or the mesh, the memory or the attention
        kernel that the run needs is not here.
      DiskFull: there is no room for its checkpoints.
    """
    check_same_config(config)
    plan = make_plan(config)
    return plan, check_machine(config, *plan)


def make_plan(config: TrainConfig) -> Plan:
    """Fits a run to its mesh and its memory. Every process calls it.

    Raises:
      InputError: there are not as many devices, or the run does not divide over them.
    """
    mesh = make_mesh(config.mesh)
    fitted = fit_to_mesh(config, mesh)
    layout = make_layout(fitted, mesh)
    if is_open(fitted):
        fitted = choose(fitted, mesh, layout, memory_of_each(mesh), shared=shares_host(mesh))
    return Plan(fitted, mesh, layout)


def examine(checks: Mapping[str, Callable[..., Finding]], *args) -> Iterator[Check]:
    """Makes the checks one after the other.

    Raises:
      InputError, DiskFull: one of them failed.
    """
    for name, check in checks.items():
        yield Check(name, *check(*args))


def warn(check: Check) -> None:
    """Says a warning in one line."""
    if check.verdict == "warning":
        say(f"WARNING: {check.name}: {check.found}; wanted: {check.wanted}")


def check_same_config(config: TrainConfig) -> None:
    """Raises `InputError` if the processes of this run have different configs."""
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


def check_machine(asked: TrainConfig, config: TrainConfig, mesh: Mesh, layout: Layout) -> str:
    """Says what the run needs and what this machine has, before anything is allocated.

    Args:
      asked: the run as its config file and command line say.
      config: the run, fitted to `mesh`.
      mesh: from `make_mesh`.
      layout: from `make_layout`.

    Returns:
      How the run was fitted, and why so, in one line.

    Raises:
      InputError: a kernel or the memory that the run needs is not here.
      DiskFull: there is no room for its checkpoints.
    """
    say(describe_model(config))
    recipe, *_ = check_recipe(asked, config, mesh, layout)
    if config != asked:
        say(recipe)
    for check in examine(MACHINE_CHECKS, asked, config, mesh, layout):
        what = "WARNING: " * (check.verdict == "warning") + check.name
        say(f"{what}: needs {check.wanted}; found {check.found}")
    return recipe


def check_recipe(asked: TrainConfig, config: TrainConfig, mesh: Mesh, layout: Layout) -> Finding:
    """How the run was fitted to its mesh and its memory. Takes what `check_machine` takes."""
    memory = memory_of_each(mesh) if is_open(asked) else 0
    found = explain(asked, config, mesh, layout, memory, shared=shares_host(mesh))
    return found, "", "ok"


# --- Machine: checks of (asked, config, mesh, layout) as `check_machine` takes them --------------


def _check_devices(asked: TrainConfig, config: TrainConfig, mesh: Mesh, layout: Layout) -> Finding:
    with on(mesh):
        check_kernels(config.model)
    device, there = mesh.devices.flat[0], jax.device_count()
    axes = ", ".join(f"{axis} {n}" for axis, n in mesh.shape.items())
    idle = device.platform != "cpu" and mesh.size < there
    found = f"{there} x {device.device_kind} ({device.platform})"
    return found, f"{mesh.size} ({axes})", "warning" if idle else "ok"


def _check_memory(asked: TrainConfig, config: TrainConfig, mesh: Mesh, layout: Layout) -> Finding:
    needed, (found, what) = memory_needed(config, mesh, layout), memory_found(mesh)
    shared = shares_host(mesh)
    total = needed.device_bytes + shared * needed.host_bytes
    if total > found:
        raise InputError(
            f"{config.name} needs {size(total)} of memory on each device and {size(found)} was "
            f"found: {memory_advice(asked, mesh, found, shared=shared)}"
        )
    return f"{size(found)} ({what})", f"{size(needed.device_bytes)} ({needed.by_part()})", "ok"


def _check_host(asked: TrainConfig, config: TrainConfig, mesh: Mesh, layout: Layout) -> Finding:
    devices, found = mesh.local_devices, host_memory()
    state = memory_needed(config, mesh, layout).host_bytes * len(devices)
    if state > found:
        o, narrow = config.optim, "optim.moment_dtype=bfloat16 and optim.rounding=stochastic, or "
        if config.model.param_dtype != "bfloat16" or o.rounding == "stochastic":
            narrow = ""
        raise InputError(
            f"optim.state_memory=pinned_host: takes {size(state)} of this host's memory and "
            f"{size(found)} is free: set {narrow}optim.state_memory=device"
        )
    copy = _checkpoint_bytes(layout) * len(devices) // mesh.size
    wanted = f"{size(copy)} (a checkpoint being written)"
    wanted = f"{size(state)} (optimizer state) and {wanted}" if state else wanted
    return size(found), wanted, "ok" if state + copy <= found else "warning"


def _check_disk(asked: TrainConfig, config: TrainConfig, mesh: Mesh, layout: Layout) -> Finding:
    free, one = shutil.disk_usage(nearest_directory(config.run_dir)).free, _checkpoint_bytes(layout)
    # Beside those kept, the checkpoint being written and the best by validation loss. Short runs
    # save fewer; an evaluation may save the best. A run counted in epochs has an unknown number of
    # updates here: assume 2 saves.
    kept = config.keep_last + 1 + (config.eval_every > 0)
    every = min(filter(None, (config.save_every, config.eval_every)), default=config.num_steps)
    saves = -(-config.num_steps // every) if config.num_steps else 2
    number, there = min(kept, saves), 0
    with contextlib.suppress(FileNotFoundError):  # a file that another run deletes
        for path in (Path(config.run_dir) / "checkpoints").rglob("*"):
            there += path.stat().st_size if path.is_file() else 0
    checkpoints = f"{plural(number, 'checkpoint')} of {size(one)}"
    if number * one - there > free:
        raise DiskFull(
            f"run_dir={config.run_dir} has {size(free)} free, and the run needs room for "
            f"{checkpoints} (keep_last={config.keep_last}; the best; the one being written): free "
            f"some disk, {'lower keep_last, ' * (config.keep_last > 1)}or choose another run_dir"
        )
    return f"{size(free)} free", checkpoints, "ok"


def nearest_directory(path: str) -> Path:
    """The path itself or the nearest directory above it that exists.

    Raises:
      InputError: the path is too long, or a directory above it may not be read.
    """
    try:
        return next(p for p in (Path(path).absolute() / "x").parents if p.exists())
    except OSError as error:
        raise InputError(f"run_dir={path}: {error.strerror}; name a directory") from None


def _checkpoint_bytes(layout: Layout) -> int:
    leaves = jax.tree.leaves(layout.state)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


MACHINE_CHECKS = {
    "devices": _check_devices,
    "memory of each device": _check_memory,
    "memory of this host": _check_host,
    "disk": _check_disk,
}


def describe_model(config: TrainConfig) -> str:
    """Name, true parameter count, shape and types in one line."""
    m, n = config.model, param_count(config.model)
    kernel = ""
    if m.uses_attention:
        chosen = m.attention_kernel if m.attention_kernel != "auto" else attention_kernel(m)
        kernel = f" ({chosen} kernel)"
    return (
        f"{config.name}: {n:,} parameters ({count(n)}), {m.context_text}{kernel}, "
        f"{plural(m.num_layers, 'layer')} x {plural(m.num_iterations, 'iteration')}, "
        f"width {m.d_model}, parameters {m.param_dtype}, matrix products {compute_dtype(m).name}"
    )


# --- Data: checks of (config, corpus) ------------------------------------------------------------


def prepare_data(config: TrainConfig, kept: Tokenizer | None = None) -> Corpus:
    """The corpus of a run, checked, and the same on every process.

    Args:
      config: the run.
      kept: a tokenizer to use instead of `data.tokenizer`.

    Raises:
      InputError: as `read_corpus`; or the model has too few ids, a source is shorter than a window,
        a sample prompt is too long, or the epochs are shorter than the warmup.
    """
    corpus = read_corpus(config, kept)
    for check in examine(DATA_CHECKS, config, corpus):
        warn(check)
    return corpus


def read_corpus(config: TrainConfig, kept: Tokenizer | None = None) -> Corpus:
    """As `prepare_data`, unchecked. The hosts may share the cache or have one each.

    Raises:
      InputError: as `prepare`; or the processes found different data.
    """
    corpus = processes.one_process_first(
        make_cache(config.data.cache_dir), lambda: prepare(config.data, tokenizer=kept)
    )
    processes.check_same(
        "the fingerprint of the data",
        f"{corpus.fingerprint}/{corpus.tokenizer.fingerprint}",
        "data.paths and data.tokenizer must name the same files on every host",
    )
    return corpus


def _check_vocabulary(config: TrainConfig, corpus: Corpus) -> Finding:
    data.check(corpus, config.model.vocab_size)
    tokenizer, most = corpus.tokenizer, config.model.vocab_size
    return f"{tokenizer.name}, {tokenizer.vocab_size:,} ids", f"{most:,} ids or fewer", "ok"


def _check_samples(config: TrainConfig, corpus: Corpus) -> Finding:
    check_samples(config, corpus.tokenizer)
    if config.sample_every == 0:
        return "none", "--sample_every N, to read what the model writes", "not checked"
    prompts = plural(len(config.sample_prompts), "prompt")
    return f"{prompts}, every {config.sample_every} updates", "", "ok"


def _check_tokens(config: TrainConfig, corpus: Corpus) -> Finding:
    data.check_windows(corpus, config.data)
    tokens = sum(files.train_tokens for files in corpus.sources)
    num_params = param_count(config.model)
    trained = _tokens_after(0, config, count_steps(config, corpus))
    usual, least = TOKENS_PER_PARAMETER * num_params, guide_minimum(num_params)
    wanted = f"{count(usual)} ({TOKENS_PER_PARAMETER} per parameter)"
    wanted += f"; the guide's minimum is {count(least)}" if least else ""
    found = (
        f"{count(tokens)} ({tokens / num_params:.2g} per parameter), {count(trained)} will be read"
    )
    return found, wanted, "ok" if tokens >= usual else "warning"


def _check_time(config: TrainConfig, corpus: Corpus) -> Finding:
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    is_time = re.fullmatch("[0-9]{1,12}", end)  # in unix seconds
    ends_in = int(end) - time.time() if is_time else math.inf
    until = f"{duration(max(0, ends_in))} until the job ends" if is_time else ""
    speeds = [
        (record["step"], record["tokens_per_second"])
        for record in read_metrics(config.run_dir)
        if _is_speed(record.get("tokens_per_second"))
    ]
    if not speeds:
        return "speed not known before the first update", until, "not checked"
    step, speed = speeds[-1]
    left = _tokens_after(step, config, count_steps(config, corpus)) / speed
    return f"{duration(left)} of training left", until, "warning" if left > ends_in else "ok"


def _is_speed(value: Any) -> bool:
    return isinstance(value, int | float) and 1e-3 <= value < math.inf


def _tokens_after(step: int, config: TrainConfig, num_steps: int) -> int:
    """The tokens of the updates after `step`, with the phases that `config` has now."""
    tokens = make_curriculum(config, num_steps).tokens
    return max(0, tokens(num_steps * config.batch_size) - tokens(step * config.batch_size))


DATA_CHECKS = {
    "vocabulary": _check_vocabulary,
    "sample prompts": _check_samples,
    "training tokens": _check_tokens,
    "time": _check_time,
}


def check_samples(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Checks that every sample prompt can be continued by this model.

    Raises:
      InputError: a prompt is no text, or it and its sample do not fit the cache of attention.
    """
    for prompt in config.sample_prompts if config.sample_every else ():
        try:
            length = len(tokenizer.encode(prompt)) + config.sample_tokens
        except (TypeError, ValueError) as error:
            raise InputError(
                f"sample_prompts: {prompt!r} cannot be encoded ({first_line(error)}); write it in "
                "UTF-8"
            ) from None
        if config.model.uses_attention and length > config.model.max_seq_len:
            raise InputError(
                f"sample_tokens={config.sample_tokens}: with the prompt {prompt[:40]!r} that is "
                f"{length} tokens, beyond model.max_seq_len={config.model.max_seq_len}; lower "
                "sample_tokens, or shorten the prompt"
            )


def count_steps(config: TrainConfig, corpus: Corpus, *, step: int = 0, position: int = 0) -> int:
    """Optimizer updates in the whole run: `num_steps`, or as many as `num_epochs` gives.

    Args:
      config: the run.
      corpus: its data.
      step: updates already done.
      position: samples consumed by those updates, perhaps at another batch size.

    Raises:
      InputError: `num_epochs` gives no more updates than the warmup takes, or the updates are too
        many for the counters.
    """
    num_steps = config.num_steps
    if num_steps == 0:
        windows = sum(data.count_windows(files, config.data.seq_len) for files in corpus.sources)
        samples = math.floor(config.num_epochs * windows)
        num_steps = max(1, step + max(0, (samples - position) // config.batch_size))
    if num_steps >= 2**31:  # the state counts them in int32
        raise InputError(
            f"num_epochs={config.num_epochs}: a run has {2**31 - 1:,} updates at most; lower it"
        )
    if config.optim.warmup_steps >= num_steps:
        raise InputError(
            f"optim.warmup_steps={config.optim.warmup_steps}: num_epochs={config.num_epochs} gives "
            f"only {plural(num_steps, 'update')} of batch_size={config.batch_size}; lower the "
            "warmup"
        )
    return num_steps
