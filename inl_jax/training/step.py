"""The training step: the state that it changes, the pure `train_step`, and how it is compiled."""

import functools
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from inl_jax.config import TrainConfig
from inl_jax.model.language_model import abstract_params, hidden_states, init_params
from inl_jax.model.layers import attention_kernel
from inl_jax.model.losses import mean_loss
from inl_jax.parallel.sharding import (
    RULES,
    abstract_optimizer_state,
    param_shardings,
    rows,
    spread_rows,
)
from inl_jax.planning.memory import num_bytes
from inl_jax.planning.xla import Program, compile_for_cuda
from inl_jax.training import metrics
from inl_jax.training.optim import (
    accumulator_dtype,
    apply_gradients,
    init_optimizer,
    learning_rate_schedule,
    make_optimizer,
    round_tree,
)


class TrainState(NamedTuple):
    """All that training changes."""

    step: jax.Array  # updates tried, int32
    skipped: jax.Array  # of them, those left out because something was not finite
    params: Any
    opt_state: Any


def init_state(key: jax.Array, *, config: TrainConfig, optimizer) -> TrainState:
    """The state before the first update."""
    return state_from_params(init_params(config.model, key), optimizer=optimizer)


def state_from_params(params, *, optimizer) -> TrainState:
    """The state before the first update, from given parameters."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, zero, params, init_optimizer(optimizer, params))


def abstract_state(config: TrainConfig, mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of the state, without allocating."""
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    params = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        abstract_params(config.model),
        param_shardings(mesh, config.model, fsdp_shards=config.mesh.fsdp_shards),
    )
    return TrainState(scalar, scalar, params, abstract_optimizer_state(config, mesh))


def split_state(state: TrainState) -> dict[str, Any]:
    """A state as a checkpoint holds it: the parameters apart from the rest."""
    rest = state._asdict()
    return {"params": rest.pop("params"), "optimizer": rest}


def join_state(found: dict[str, Any]) -> TrainState:
    """The inverse of `split_state`."""
    return TrainState(params=found["params"], **found["optimizer"])


def loss_fn(params, batch_BS, dropout_key, *, config: TrainConfig) -> jax.Array:
    """Mean next-token loss of sequences [B, S + 1], float32."""
    dropout_key = dropout_key if config.model.dropout > 0 else None
    hidden = hidden_states(config.model, params, batch_BS[:, :-1], dropout_key=dropout_key)
    return mean_loss(params, hidden, batch_BS[:, 1:], chunk=config.loss_chunk)


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
        optimizer,
        grads,
        state.opt_state,
        state.params,
        scale=jnp.minimum(1, config.optim.clip_norm / grad_norm),
        keep=~finite,
        key=jax.random.fold_in(key, config.accumulate_steps),
    )
    skipped = state.skipped + jnp.where(finite, 0, 1)
    results = {
        "loss": loss,
        "grad_norm": grad_norm,
        "learning_rate": schedule(state.step - state.skipped),
        "finite": finite,
        "skipped": skipped,
    }
    return TrainState(state.step + 1, skipped, params, opt_state), results


def trace_step(config: TrainConfig, num_steps: int, mesh: Mesh, abstract: TrainState):
    """`train_step` traced for this run, its state donated; `abstract` is from `abstract_state`."""
    config = spread_rows(config, mesh)
    batch = jax.ShapeDtypeStruct(
        (config.batch_size, config.data.seq_len + 1), jnp.int32, sharding=rows(mesh)
    )
    schedule = learning_rate_schedule(config, num_steps)
    step_fn = functools.partial(
        train_step,
        config=config,
        optimizer=make_optimizer(config, num_steps),
        schedule=schedule,
        shardings=param_shardings(mesh, config.model),
    )
    shardings = jax.tree.map(lambda a: a.sharding, abstract)
    jitted = jax.jit(step_fn, donate_argnums=0, out_shardings=(shardings, NamedSharding(mesh, P())))
    return jitted.trace(abstract, batch)


def compile_step(config: TrainConfig, num_steps: int, mesh: Mesh, abstract: TrainState, log):
    """The training step compiled for this run, and what it was compiled to checked.

    Raises:
      RuntimeError: cuDNN attention, or optimizer state in host memory, was asked for and is not
        in it.
    """
    start = time.perf_counter()
    log.say("compiling the training step ...")
    compiled = trace_step(config, num_steps, mesh, abstract).lower().compile()
    log.say(f"compiled in {time.perf_counter() - start:.1f} s")
    memory, held = compiled.memory_analysis(), num_bytes(abstract)
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
