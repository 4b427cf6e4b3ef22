"""Memory that a training step needs on each device and on the host, and memory that there is.

Nothing is allocated. The state's bytes are exact, from its layout. The rest is an estimate, fitted
to what XLA's compilers report (`_working_memory`).
"""

import math
from typing import Any, NamedTuple, get_args, get_type_hints

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from inl_jax.config import ModelConfig, TrainConfig, with_fields
from inl_jax.console import size
from inl_jax.limits import host_memory
from inl_jax.model.language_model import abstract_params, kept_names
from inl_jax.model.layers import PRODUCT, compute_dtype
from inl_jax.model.losses import COLUMNS as LOSS_COLUMNS
from inl_jax.model.losses import chunk_tokens
from inl_jax.model.platform.device import current_device
from inl_jax.parallel.sharding import batch_shards, num_bytes
from inl_jax.training.optim import MasterState, accumulator_dtype
from inl_jax.training.state import Layout


class MemoryNeeded(NamedTuple):
    """Bytes by part, on each device and on the host for each device."""

    device: dict[str, int]
    host: dict[str, int]

    @property
    def device_bytes(self) -> int:
        """Bytes on one device at the peak of a step."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory for one device's share of the state."""
        return sum(self.host.values())

    def by_part(self) -> str:
        """The parts of a device's memory in one line."""
        return ", ".join(f"{part} {size(n)}" for part, n in self.device.items() if n)


def memory_needed(config: TrainConfig, mesh: Mesh, layout: Layout) -> MemoryNeeded:
    """Bytes that a training step needs on each device, by part.

    Parts named "(estimate)" are estimates; the others are exact.

    Args:
      config: the run, fitted to `mesh`.
      mesh: from `make_mesh`.
      layout: from `make_layout`.
    """
    state = _optimizer_bytes(layout.state.opt_state)
    dtype = accumulator_dtype(config)
    accumulated = jax.tree.map(lambda g: g.update(dtype=dtype), layout.gradients)
    device = {
        "parameters": num_bytes(layout.state.params),
        "masters": state["masters", "device"],
        "moments": state["moments", "device"],
        "gradients": num_bytes(layout.gradients),
        "accumulator": num_bytes(accumulated) if config.accumulate_steps > 1 else 0,
    }
    working = _working_memory(config, mesh)
    device |= {f"{part} (estimate)": n for part, n in working.items()}
    host = {part: state[part, "pinned_host"] for part in ("masters", "moments")}
    return MemoryNeeded(device, {part: n for part, n in host.items() if n})


def activations_by_remat(config: TrainConfig, mesh: Mesh) -> dict[str, int]:
    """Estimated bytes of activations on each device, for each value of `model.remat`.

    Args:
      config: the run, fitted to `mesh`.
      mesh: from `make_mesh`.
    """
    _, *modes = get_args(get_type_hints(ModelConfig)["remat"])  # all but auto
    configs = {mode: with_fields(config, {"model.remat": mode}) for mode in modes}
    return {mode: _working_memory(c, mesh)["activations"] for mode, c in configs.items()}


def _optimizer_bytes(state: Any) -> dict[tuple[str, str], int]:
    """Bytes of an optimizer's state for one device, by (masters or moments, memory kind)."""
    sizes = {
        (part, kind): 0 for part in ("masters", "moments") for kind in ("device", "pinned_host")
    }
    for node in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, MasterState)):
        parts = [("moments", node)]
        if isinstance(node, MasterState):
            parts = [("masters", node.masters), ("moments", node.inner)]
        for part, tree in parts:
            for leaf in jax.tree.leaves(tree):
                host = leaf.sharding.memory_kind == "pinned_host"
                sizes[part, "pinned_host" if host else "device"] += num_bytes(leaf)
    return sizes


# Float32 values per token. In a block, beside what the integrator keeps: (in D, in F), by the type
# of matrix products. While the gradient of one integrator iteration is computed: in D.
_REST_OF_BLOCK = {"float32": (11, 2), "bfloat16": (4, 1.5)}
_PRODUCTS = (5, 1)  # results of products, where a block keeps these alone (`kept_names`)
_GATED = 3  # the gated context's decay logit, gate and product with it: more in D, in both
_ITERATION = {"float32": 12, "bfloat16": 6}
_LOGITS = {"float32": 2, "bfloat16": 1}  # float32 copies of the logits of a chunk
_SCORES = 1.4  # copies of a block's attention scores, which are never all there at once


def _working_memory(config: TrainConfig, mesh: Mesh) -> dict[str, int]:
    """Estimated bytes on one device beside its state and gradients, by part.

    Every block keeps its input and what `remat` does not recompute. One block at a time also holds
    all the rest of its activations. Units of D float32 values per token:
    - `_REST_OF_BLOCK` for the block without the integrator;
    - 2 for each iteration (or segment) whose state is kept; 17 with automatic differentiation;
    - `_ITERATION` while an iteration's gradient is computed, and 2 for each iteration of a segment,
      both for the positions of one chunk only.
    These numbers are fitted to XLA's CPU compiler for float32 products and to its CUDA compiler for
    bfloat16 ones (docs/memory.md). After the backward pass the optimizer reuses this memory; its
    largest need is the update of the embedding.
    """
    c, o = config.model, config.optim
    D, T, segment = c.d_model, c.num_iterations, c.integrator_segment
    seq_len, width = config.data.seq_len, jnp.dtype(c.param_dtype).itemsize
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    tokens = config.batch_size // config.accumulate_steps // batch_shards(mesh) * seq_len
    products = "bfloat16" if compute_dtype(c).itemsize == 2 else "float32"
    vector = max(4, width) * tokens
    in_D, in_F = _REST_OF_BLOCK[products]
    more = _GATED if c.context == "gated" else 0
    rest = vector * ((in_D + more) * D + in_F * c.d_ff / tensor)
    scores = 0
    if c.uses_attention and (
        c.attention_kernel == "xla" or (c.attention_kernel == "auto" and products == "float32")
    ):  # XLA holds the scores; cuDNN, which takes only 16-bit types, does not
        scores = _SCORES * 4 * tokens * seq_len * c.num_heads / tensor
    kept = working = 0
    if T > 0 and c.integrator_gradient == "autodiff":
        kept = vector * 17 * T * D / tensor
    elif T > 0:
        states = 1 if c.trajectory_dtype == "bfloat16" else 2  # x and v, in units of float32
        kept = vector * (states * -(-T // segment) * D / tensor + 4 * c.controller_width * T)
        share = min(c.integrator_chunk or seq_len, seq_len) / seq_len
        live = _ITERATION[products] + (2 * segment if segment > 1 else 0)
        working = vector * share * live * D / tensor
    held = rest  # of it, with `remat none`
    if PRODUCT in (kept_names(c) or ()):
        held = vector * ((_PRODUCTS[0] + more) * D + _PRODUCTS[1] * c.d_ff / tensor)
    one_block, every_block = {
        "none": (rest - held, held + kept),
        "integrator": (kept, rest),
        "all_but_integrator": (rest, kept),
        "block": (rest + kept, 0),
    }[c.remat]
    stream = tokens * D * compute_dtype(c).itemsize
    activations = c.num_layers * (stream + every_block) + one_block + working + scores
    if current_device().platform == "cpu":  # there XLA recomputes all blocks of a group at once
        activations += (len(c.mixers) - 1) * (rest + kept + working)

    chunk = chunk_tokens(config.loss_chunk, c.vocab_size, tokens)
    columns = LOSS_COLUMNS if D % LOSS_COLUMNS == 0 else D
    table = max(4, width) * c.vocab_size // tensor  # one column of the embedding in float32
    logits = table * (_LOGITS[products] * chunk + columns)
    if width < 4:  # the embedding's gradient is accumulated in float32, apart from the others
        logits += table * D
    gathered = 0
    if fsdp > 1 and config.mesh.fsdp_shards == "all":  # 2 layers at a time, or the embedding
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
    """Bytes that a compiled step takes on each device, and of host memory for that device.

    XLA's CPU compiler counts both as device memory.

    Args:
      memory: from `memory_analysis()`.
    """
    device = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    device += memory.output_size_in_bytes - memory.alias_size_in_bytes
    return device, memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes


def memory_found(mesh: Mesh) -> tuple[int, str]:
    """Bytes of the smallest device of this process, and a description of that memory."""
    limits = [(d.memory_stats() or {}).get("bytes_limit", 0) for d in mesh.local_devices]
    if limit := min(limits):
        smallest = mesh.local_devices[limits.index(limit)]
        return limit, f"{smallest.device_kind}, the share JAX may use"
    return host_memory() // len(mesh.local_devices), "free memory of this machine"


def shares_host(mesh: Mesh) -> bool:
    """Whether host memory is the devices' own memory, as it is for CPUs."""
    return mesh.local_devices[0].platform == "cpu"
