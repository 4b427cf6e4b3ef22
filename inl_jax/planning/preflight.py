"""What is checked before anything is allocated: config, machine, data, length of the run."""

import contextlib
import hashlib
import math
import shutil
from pathlib import Path

import jax
from jax.sharding import Mesh

from inl_jax.config import InputError, TrainConfig, differences, from_json, to_json
from inl_jax.console import count, say, size
from inl_jax.data import batches as data
from inl_jax.data.corpus import Corpus, make_cache, prepare
from inl_jax.data.tokenizer import Tokenizer
from inl_jax.model.language_model import attention_kernel, compute_dtype, param_count
from inl_jax.parallel import processes
from inl_jax.parallel.sharding import batch_shards
from inl_jax.planning.memory import host_memory, memory_found, memory_needed, smallest_change
from inl_jax.training.state import Layout, TrainState


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


def check_machine(config: TrainConfig, fitted: TrainConfig, mesh: Mesh, layout: Layout) -> None:
    """Says what the run needs and what is here, before anything is allocated.

    Args:
      config: the run, as asked for.
      fitted: the run, fitted to `mesh`.
      mesh: its devices.
      layout: from `make_layout`.

    Raises:
      InputError: the devices, the memory or the disk do not suffice.
    """
    if config.model.context == "attention":
        attention_kernel(config.model)  # raises where it cannot be had
    say(describe_model(config))
    if fitted != config:
        say(
            f"accumulate_steps {config.accumulate_steps} -> {fitted.accumulate_steps}, so that "
            f"each of {batch_shards(mesh)} devices has rows of every micro-batch"
        )
    _check_memory(fitted, mesh, layout)
    _check_disk(config, layout.state)


def _check_memory(config: TrainConfig, mesh: Mesh, layout: Layout) -> None:
    needed, (found, what) = memory_needed(config, mesh, layout), memory_found(mesh)
    parts = ", ".join(f"{part} {size(held)}" for part, held in needed.device.items() if held)
    say(
        f"memory on each of {mesh.size} devices: needs {size(needed.device_bytes)} "
        f"({parts}); found {size(found)} ({what})"
    )
    host, host_found = needed.host_bytes * len(mesh.local_devices), host_memory()
    if host:
        say(
            f"memory of this host: needs {size(host)} (optimizer state of its devices); "
            f"found {size(host_found)}"
        )
    shared = mesh.local_devices[0].platform == "cpu"  # one memory for both
    total = needed.device_bytes + shared * needed.host_bytes
    if total > found:
        change = smallest_change(config, mesh, found, shared=shared)
        advice = (
            f"add {' '.join(change)}"
            if change
            else "more devices (mesh.fsdp), a shorter data.seq_len or a smaller model are needed"
        )
        raise InputError(
            f"{config.name} needs {size(total)} of memory on each device and "
            f"{size(found)} was found: {advice}"
        )
    if host > host_found:
        o, narrow = config.optim, "optim.moment_dtype=bfloat16 and optim.rounding=stochastic, or "
        if config.model.param_dtype != "bfloat16" or o.rounding == "stochastic":
            narrow = ""
        raise InputError(
            f"optim.state_memory=pinned_host: takes {size(host)} of this host's memory and "
            f"{size(host_found)} is free: set {narrow}optim.state_memory=device"
        )


def _check_disk(config: TrainConfig, abstract: TrainState) -> None:
    run_dir = Path(config.run_dir).absolute()
    free = shutil.disk_usage(next(p for p in (run_dir / "x").parents if p.exists())).free
    one = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(abstract))
    # Beside the newest there are the one that is being written and, where validation finds it, the
    # best; but no more than are ever saved. How many updates epochs make is not known yet.
    count = config.keep_last + 1 + (config.eval_every > 0)
    saves = 1 if config.save_every == 0 else -(-config.num_steps // config.save_every) or 2
    there = 0
    with contextlib.suppress(FileNotFoundError):  # another process trains there, as is said later
        for path in (run_dir / "checkpoints").rglob("*"):
            there += path.stat().st_size if path.is_file() else 0
    if min(count, saves) * one - there > free:
        raise InputError(
            f"run_dir={config.run_dir} has {size(free)} free; a checkpoint takes "
            f"{size(one)}, and {min(count, saves)} exist at a time (keep_last="
            f"{config.keep_last}; the best; the one being written): free some disk, lower "
            "keep_last, or choose another run_dir"
        )


def describe_model(config: TrainConfig) -> str:
    """Name, true parameter count and shape in one line."""
    m, n = config.model, param_count(config.model)
    kernel = ""
    if m.context == "attention":
        chosen = m.attention_kernel if m.attention_kernel != "auto" else attention_kernel(m)
        kernel = f" ({chosen} kernel)"
    return (
        f"{config.name}: {n:,} parameters ({count(n)}), {m.context} context{kernel}, "
        f"{m.num_layers} layers x {m.num_iterations} iterations, width {m.d_model}, "
        f"parameters {m.param_dtype}, matrix products {compute_dtype(m).name}"
    )


def prepare_everywhere(config: TrainConfig) -> Corpus:
    """The same corpus on every process, whether their hosts share the cache or not.

    Raises:
      InputError: as `prepare` does, and where the processes found different data.
    """
    corpus = processes.once_for_each_copy(
        make_cache(config.data.cache_dir), lambda: prepare(config.data, report=say)
    )
    processes.check_same(
        "the fingerprint of the data",
        f"{corpus.fingerprint}/{corpus.tokenizer.fingerprint}",
        "data.paths and data.tokenizer must name the same files on every host",
    )
    return corpus


def check_sample(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Raises `InputError` where the printed samples would be too long for the model."""
    longest = len(tokenizer.encode(config.sample_prompt)) + config.sample_tokens
    if config.sample_every > 0 and longest > config.model.max_seq_len:
        raise InputError(
            f"sample_tokens={config.sample_tokens}: with the prompt that is {longest} tokens, "
            f"beyond model.max_seq_len={config.model.max_seq_len}; lower sample_tokens"
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
