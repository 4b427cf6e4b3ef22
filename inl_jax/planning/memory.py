"""What a training step needs of each device's memory and of the host's, and what there is.

Nothing is allocated: the state is read off its shapes and shardings; what a step needs beside it is
an estimate, fitted to what XLA's compilers say (see `_working`).
"""

import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from inl_jax.config import InputError, ModelConfig, TrainConfig
from inl_jax.config_file import override
from inl_jax.model.language_model import abstract_params, compute_dtype
from inl_jax.model.losses import COLUMNS as LOSS_COLUMNS
from inl_jax.parallel.sharding import batch_shards, fit_to_mesh, make_mesh, num_bytes
from inl_jax.training.optim import MasterState, accumulator_dtype
from inl_jax.training.state import Layout, make_layout

# Memory in MiB as nvidia-smi shows it.
DEVICES = {
    "b200-180gb": 183359,
    "h200-141gb": 143771,
    "h100-80gb": 81559,
    "a100-80gb": 81920,
    "a100-40gb": 40960,
    "l40s": 46068,
    "rtx6000-ada": 49140,
    "rtx5090": 32607,
    "rtx4090": 24564,
    "rtx3090": 24576,
    "a10g": 23028,
    "rtx4080": 16376,
    "rtx4060ti-16gb": 16380,
}
USABLE = 0.92  # of it, by JAX at XLA_PYTHON_CLIENT_MEM_FRACTION=.95; the CUDA context has the rest


def find_device(name: str) -> str:
    """The entry of `DEVICES` that `name` is, or is the only one to begin with.

    Raises:
      InputError: there is none, or there are several.
    """
    found = [known for known in DEVICES if known.startswith(name.lower())]
    if name.lower() in DEVICES:
        found = [name.lower()]
    if len(found) != 1:
        raise InputError(f"--device {name}: choose one of {', '.join(found or DEVICES)}")
    return found[0]


class MemoryNeeded(NamedTuple):
    """Bytes by part, for each device and, where there is any, for its share of the host."""

    device: dict[str, int]
    host: dict[str, int]

    @property
    def device_bytes(self) -> int:
        """All that one device holds at the peak of a step."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """What one device's share of the state takes in the host's memory."""
        return sum(self.host.values())


def memory_needed(config: TrainConfig, mesh: Mesh, layout: Layout) -> MemoryNeeded:
    """Bytes a training step needs for each device of `mesh`, by part; those of the state are exact.

    Raises:
      InputError: the model or a micro-batch does not divide over the mesh.
    """
    c = config.model
    params, gradients = num_bytes(layout.state.params), num_bytes(layout.gradients)
    rows = config.batch_size // config.accumulate_steps // batch_shards(mesh)
    tokens = rows * config.data.seq_len
    state = _state_bytes(layout.state.opt_state)
    device = {
        "parameters": params,
        "masters": state["masters", "device"],
        "moments": state["moments", "device"],
        "gradients": gradients,
        "accumulator": 0,
    }
    if config.accumulate_steps > 1:
        width = jnp.dtype(accumulator_dtype(config)).itemsize
        device["accumulator"] = gradients // jnp.dtype(c.param_dtype).itemsize * width
    working = _working(config, tokens, mesh)
    device |= {f"{part} (estimate)": size for part, size in working.items()}
    host = {part: state[part, "pinned_host"] for part in ("masters", "moments")}
    return MemoryNeeded(device, {part: size for part, size in host.items() if size})


def activations_by_remat(config: TrainConfig, mesh: Mesh) -> dict[str, int]:
    """Estimated bytes of activations on each device of `mesh` under each `remat` mode."""

    def activations(mode: str) -> int:
        changed = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=mode))
        return memory_needed(changed, mesh, make_layout(changed, mesh)).device[
            "activations (estimate)"
        ]

    return {mode: activations(mode) for mode in get_args(get_type_hints(ModelConfig)["remat"])}


def _state_bytes(state: Any) -> dict[tuple[str, str], int]:
    """Bytes of an optimizer's state on one device, by (masters or moments, memory)."""
    sizes = {
        (part, kind): 0 for part in ("masters", "moments") for kind in ("device", "pinned_host")
    }
    for part in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, MasterState)):
        split = (
            [("masters", part.masters), ("moments", part.inner)]
            if isinstance(part, MasterState)
            else [("moments", part)]
        )
        for name, tree in split:
            for leaf in jax.tree.leaves(tree):
                host = leaf.sharding.memory_kind == "pinned_host"
                sizes[name, "pinned_host" if host else "device"] += num_bytes(leaf)
    return sizes


# In D float32 values per token, beside what is kept of the integrator: for the rest of a block (and
# in F values), and while the gradient of one iteration is computed.
_REST = {"float32": (16, 3), "bfloat16": (5, 1.5)}
_SCORES = 3.75  # copies of a block's attention scores
_ITERATION = {"float32": 12, "bfloat16": 5}


def _working(config: TrainConfig, tokens: int, mesh: Mesh) -> dict[str, int]:
    """Bytes beside state and gradients, on a device with `tokens` tokens of a micro-batch.

    Kept for every block: its input, and what `remat` does not compute again. Beside that, one block
    at a time has all of its own. In units of D float32 values per token: `_REST` for what is not
    the integrator; 2 for every iteration (or segment) whose state is kept, or 17 by automatic
    differentiation; `_ITERATION` while an iteration's gradient is computed and 2 for every
    iteration of a segment, both only for the positions of one chunk. Under float32 products this
    was fitted to XLA's CPU compiler, under bfloat16 to its CUDA compiler (docs/memory.md). After
    the backward pass the optimizer takes the place of all that, the embedding's being its largest.
    """
    c, o = config.model, config.optim
    D, T, segment = c.d_model, c.num_iterations, c.integrator_segment
    seq_len, width = config.data.seq_len, jnp.dtype(c.param_dtype).itemsize
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    products = "bfloat16" if compute_dtype(c).itemsize == 2 else "float32"
    vector = max(4, width) * tokens
    of_D, of_F = _REST[products]
    rest = vector * (of_D * D + of_F * c.d_ff / tensor)
    if c.context == "attention" and (
        c.attention_kernel == "xla" or (c.attention_kernel == "auto" and products == "float32")
    ):  # XLA holds the scores, where cuDNN (which takes 16-bit types alone) does not
        rest += _SCORES * 4 * tokens * seq_len * c.num_heads / tensor
    kept = working = 0
    if T > 0 and c.integrator_gradient == "autodiff":
        kept = vector * 17 * T * D / tensor
    elif T > 0:
        kept = vector * (2 * -(-T // segment) * D / tensor + 4 * c.controller_width * T)
        share = min(c.integrator_chunk or seq_len, seq_len) / seq_len
        live = _ITERATION[products] + (2 * segment if segment > 1 else 0)
        working = vector * share * live * D / tensor
    once, each = {
        "none": (0, rest + kept),
        "integrator": (kept, rest),
        "all_but_integrator": (rest, kept),
        "block": (rest + kept, 0),
    }[c.remat]
    stream = tokens * D * compute_dtype(c).itemsize
    activations = c.num_layers * (stream + each) + once + working

    chunk = min(config.loss_chunk or tokens, tokens)
    columns = LOSS_COLUMNS if D % LOSS_COLUMNS == 0 else D
    table = max(4, width) * c.vocab_size // tensor  # one column of it in float32
    logits = table * (2 * chunk + columns)
    if width < 4:  # the embedding's gradient, added up apart from the other gradients
        logits += table * D
    gathered = 0
    if fsdp > 1 and config.mesh.fsdp_shards == "all":  # two layers', or the embedding's
        blocks = abstract_params(c)["blocks"]
        sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(blocks)]
        gathered = width * max(2 * sum(sizes) // c.num_layers, c.vocab_size * D)
        gathered //= tensor

    copies = 6 if o.moment_dtype == "bfloat16" else 2
    if o.state_memory == "pinned_host":
        trees = {"adamw": 2, "adafactor": 0}[o.optimizer]
        trees = trees / 2 if o.moment_dtype == "bfloat16" else trees
        copies = max(copies, 2 + 2 * (trees + (o.rounding == "masters" and width < 4)))
    update = int(copies * table * D / fsdp)
    backward = int(activations) + logits + gathered
    return {
        "activations": int(activations),
        "logits": logits,
        "gathered": gathered,
        "update": max(0, update - backward),
    }


def compiled_bytes(memory: Any) -> tuple[int, int]:
    """Bytes a compiled step takes on each device, and on its host; XLA for CPUs counts all as one.

    Args:
      memory: from `memory_analysis()`.
    """
    device = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    device += memory.output_size_in_bytes - memory.alias_size_in_bytes
    return device, memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes


def memory_found(mesh: Mesh) -> tuple[int, str]:
    """Bytes of memory each device of `mesh` has, and what that is."""
    device = mesh.local_devices[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit:
        return limit, f"{device.device_kind}, the share JAX may use"
    return host_memory() // len(mesh.local_devices), "free memory of this machine"


def host_memory() -> int:
    """Bytes of this machine's memory that are free, or that its container may use."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # counts page cache that can be given back
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        limit = Path("/sys/fs/cgroup") / name
        if limit.exists() and limit.read_text().strip().isdigit():
            available = min(available, int(limit.read_text()))
    return available


def smallest_change(
    config: TrainConfig, mesh: Mesh, usable: float, *, shared: bool = False
) -> list[str] | None:
    """Flags of the smallest change that makes a run fit; None where no change known here does.

    Changes are tried from those that cost least to those that change the arithmetic: each alone,
    then each with those before it that do no harm, of which what is not needed is left out again.

    Args:
      config: the run.
      mesh: its devices.
      usable: bytes of each that it may take.
      shared: whether they take what is kept in host memory from these, as CPUs do.
    """
    devices, before = mesh.devices.ravel().tolist(), []

    def needs(changes: list[list[str]]) -> float:
        try:
            changed = override(config, sum(changes, []))
            mesh = make_mesh(changed.mesh, devices=devices)
            changed = fit_to_mesh(changed, mesh)
            needed = memory_needed(changed, mesh, make_layout(changed, mesh))
        except InputError:  # does not divide, or does not go together
            return math.inf
        return needed.device_bytes + shared * needed.host_bytes

    for flags in _changes(config, mesh):
        if needs([flags]) <= usable:
            return flags
        if needs([*before, flags]) > needs(before):
            continue
        before.append(flags)
        if needs(before) <= usable:
            for other in before[:-1]:
                without = [kept for kept in before if kept is not other]
                before = without if needs(without) <= usable else before
            return sum(before, [])
    return None


def _changes(config: TrainConfig, mesh: Mesh) -> Iterator[list[str]]:
    # One sequence of each device at a time.
    yield ["--accumulate_steps", str(config.batch_size // batch_shards(mesh))]
    yield ["--model.remat", "block"]
    if config.model.num_iterations > 1:
        yield ["--model.integrator_segment", str(-(-config.model.num_iterations // 2))]
        yield ["--model.integrator_chunk", str(-(-config.data.seq_len // 2))]
    if mesh.size > 1:
        yield ["--mesh.data", "1", "--mesh.fsdp", str(mesh.size), "--mesh.tensor", "1"]
    yield ["--optim.state_memory", "pinned_host"]
    if config.model.param_dtype == "bfloat16":
        yield ["--optim.accumulator_dtype", "bfloat16"]
        yield ["--optim.moment_dtype", "bfloat16", "--optim.rounding", "stochastic"]
        yield ["--optim.optimizer", "adafactor", "--optim.rounding", "stochastic"]
