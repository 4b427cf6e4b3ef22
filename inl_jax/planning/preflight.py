"""Before anything is allocated: the config fitted to its mesh, and checks of machine and data."""

import contextlib
import hashlib
import math
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from inl_jax.config import InputError, TrainConfig
from inl_jax.config_file import differences, from_json, to_json
from inl_jax.console import count, first_line, plural, say, size
from inl_jax.data import batches as data
from inl_jax.data.corpus import Corpus, make_cache, prepare
from inl_jax.data.tokenizer import Tokenizer
from inl_jax.model.language_model import param_count
from inl_jax.model.layers import attention_kernel, compute_dtype
from inl_jax.parallel import processes
from inl_jax.parallel.sharding import batch_shards, fit_to_mesh, make_mesh
from inl_jax.planning.memory import (
    as_flags,
    host_memory,
    memory_found,
    memory_needed,
    smallest_change,
)
from inl_jax.training.state import Layout, make_layout


class Plan(NamedTuple):
    """How a run will be laid out on this machine."""

    config: TrainConfig  # fitted to the mesh
    mesh: Mesh
    layout: Layout


def plan_run(config: TrainConfig) -> Plan:
    """Fits a run to its mesh, says what it needs and what this machine has. Nothing is allocated.

    Raises:
      InputError: the processes have different configs, or the mesh, the memory, the disk or the
        attention kernel that the run needs is not here.
    """
    check_same_config(config)
    mesh = make_mesh(config.mesh)
    fitted = fit_to_mesh(config, mesh)
    layout = make_layout(fitted, mesh)
    check_machine(config, fitted, mesh, layout)
    return Plan(fitted, mesh, layout)


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


def check_machine(asked: TrainConfig, config: TrainConfig, mesh: Mesh, layout: Layout) -> None:
    """Says what the run needs and what this machine has, before anything is allocated.

    Args:
      asked: the run as its config file and command line say.
      config: the run, fitted to `mesh`.
      mesh: from `make_mesh`.
      layout: from `make_layout`.

    Raises:
      InputError: the attention kernel, the memory or the disk that the run needs is not here.
    """
    if config.model.context == "attention":
        attention_kernel(config.model)  # raises if this machine cannot run it
    say(describe_model(config))
    if config.accumulate_steps != asked.accumulate_steps:
        say(
            f"accumulate_steps {asked.accumulate_steps} -> {config.accumulate_steps}, so that each "
            f"of {batch_shards(mesh)} devices has rows of every micro-batch"
        )
    _check_memory(asked, config, mesh, layout)
    _check_disk(config, layout)


def _check_memory(asked: TrainConfig, config: TrainConfig, mesh: Mesh, layout: Layout) -> None:
    needed, (found, what) = memory_needed(config, mesh, layout), memory_found(mesh)
    parts = ", ".join(f"{part} {size(n)}" for part, n in needed.device.items() if n)
    where = "the device" if mesh.size == 1 else f"each of {mesh.size} devices"
    say(
        f"memory on {where}: needs {size(needed.device_bytes)} ({parts}); found {size(found)} "
        f"({what})"
    )
    host, host_found = needed.host_bytes * len(mesh.local_devices), host_memory()
    if host:
        say(
            f"memory of this host: needs {size(host)} (optimizer state of its devices); "
            f"found {size(host_found)}"
        )
    shared = mesh.local_devices[0].platform == "cpu"  # a CPU device has no memory of its own
    total = needed.device_bytes + shared * needed.host_bytes
    if total > found:
        change = smallest_change(asked, mesh, found, shared=shared)
        advice = (
            f"add {as_flags(change)}"
            if change
            else "use more devices (mesh.fsdp), a shorter data.seq_len or a smaller model"
        )
        raise InputError(
            f"{config.name} needs {size(total)} of memory on each device and {size(found)} was "
            f"found: {advice}"
        )
    if host > host_found:
        o, narrow = config.optim, "optim.moment_dtype=bfloat16 and optim.rounding=stochastic, or "
        if config.model.param_dtype != "bfloat16" or o.rounding == "stochastic":
            narrow = ""
        raise InputError(
            f"optim.state_memory=pinned_host: takes {size(host)} of this host's memory and "
            f"{size(host_found)} is free: set {narrow}optim.state_memory=device"
        )


def _check_disk(config: TrainConfig, layout: Layout) -> None:
    run_dir = Path(config.run_dir).absolute()
    free = shutil.disk_usage(next(p for p in (run_dir / "x").parents if p.exists())).free
    one = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(layout.state))
    # Beside those kept, the checkpoint being written and the best by validation loss. Short runs
    # save fewer. A run counted in epochs has an unknown number of updates here: assume 2 saves.
    kept = config.keep_last + 1 + (config.eval_every > 0)
    saves = 1 if config.save_every == 0 else -(-config.num_steps // config.save_every) or 2
    number, there = min(kept, saves), 0
    with contextlib.suppress(FileNotFoundError):  # a file that another run deletes
        for path in (run_dir / "checkpoints").rglob("*"):
            there += path.stat().st_size if path.is_file() else 0
    if number * one - there > free:
        raise InputError(
            f"run_dir={config.run_dir} has {size(free)} free, and the run needs room for "
            f"{plural(number, 'checkpoint')} of {size(one)} (keep_last={config.keep_last}; the "
            "best; the one being written): free some disk, lower keep_last, or choose another "
            "run_dir"
        )


def describe_model(config: TrainConfig) -> str:
    """Name, true parameter count, shape and types in one line."""
    m, n = config.model, param_count(config.model)
    kernel = ""
    if m.context == "attention":
        chosen = m.attention_kernel if m.attention_kernel != "auto" else attention_kernel(m)
        kernel = f" ({chosen} kernel)"
    return (
        f"{config.name}: {n:,} parameters ({count(n)}), {m.context} context{kernel}, "
        f"{plural(m.num_layers, 'layer')} x {plural(m.num_iterations, 'iteration')}, "
        f"width {m.d_model}, parameters {m.param_dtype}, matrix products {compute_dtype(m).name}"
    )


def prepare_data(config: TrainConfig) -> Corpus:
    """The corpus of a run, checked, and the same on every process.

    The hosts may share the cache or have one each.

    Raises:
      InputError: as `prepare`; or the processes found different data, the model has too few ids,
        the sample prompt is too long, or the epochs are shorter than the warmup.
    """
    corpus = processes.one_process_first(
        make_cache(config.data.cache_dir), lambda: prepare(config.data)
    )
    processes.check_same(
        "the fingerprint of the data",
        f"{corpus.fingerprint}/{corpus.tokenizer.fingerprint}",
        "data.paths and data.tokenizer must name the same files on every host",
    )
    data.check(corpus, config.model.vocab_size)
    check_samples(config, corpus.tokenizer)
    count_steps(config, corpus)
    return corpus


def check_samples(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Checks that every sample prompt can be continued by this model.

    Raises:
      InputError: a prompt is no text, or it and its sample are too long for the model.
    """
    for prompt in config.sample_prompts if config.sample_every else ():
        try:
            length = len(tokenizer.encode(prompt)) + config.sample_tokens
        except (TypeError, ValueError) as error:
            raise InputError(
                f"sample_prompts: {prompt!r} cannot be encoded ({first_line(error)}); write it in "
                "UTF-8"
            ) from None
        if length > config.model.max_seq_len:
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
      InputError: `num_epochs` gives no more updates than the warmup takes.
    """
    if config.num_steps > 0:
        return config.num_steps
    windows = sum(data.count_windows(files, config.data.seq_len) for files in corpus.sources)
    left = math.floor(config.num_epochs * windows) - position
    num_steps = max(1, step + max(0, left // config.batch_size))
    if config.optim.warmup_steps >= num_steps:
        raise InputError(
            f"optim.warmup_steps={config.optim.warmup_steps}: num_epochs={config.num_epochs} gives "
            f"only {plural(num_steps, 'update')} of batch_size={config.batch_size}; lower the "
            "warmup"
        )
    return num_steps
