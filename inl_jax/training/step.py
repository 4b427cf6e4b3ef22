"""The training step: the pure `train_step`, and how it is compiled.

Shapes: B sequences of an update, L tokens of a sequence and the one that follows it, k
micro-batches.
"""

import functools
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from inl_jax.config import TrainConfig
from inl_jax.console import say, size
from inl_jax.failures import MachineFailure
from inl_jax.limits import return_freed_memory
from inl_jax.model.language_model import hidden_states, param_count
from inl_jax.model.layers import at_least_float32
from inl_jax.model.losses import mean_loss
from inl_jax.model.mixers.attention import attention_kernel
from inl_jax.parallel.processes import meeting_first
from inl_jax.parallel.sharding import batch_shards, num_bytes, rows, shardings_of
from inl_jax.training import spikes
from inl_jax.training.compile_options import compile_options
from inl_jax.training.optim import accumulator_dtype, apply_gradients, make_optimizer, round_tree
from inl_jax.training.state import Layout, TrainState


def loss_fn(params, batch_BL, dropout_key, *, config: TrainConfig) -> jax.Array:
    """Mean next-token loss of sequences [B, L], in nats per token, float32."""
    dropout_key = dropout_key if config.model.dropout > 0 else None
    hidden = hidden_states(config.model, params, batch_BL[:, :-1], dropout_key=dropout_key)
    return mean_loss(params, hidden, batch_BL[:, 1:], chunk=config.loss_chunk)


def mean_over_micro_batches(params, batch_BL, key, *, config: TrainConfig, shardings=None):
    """Loss and gradients of a batch, computed one micro-batch at a time.

    Row `i` goes to micro-batch `i mod k`, so each device keeps its own rows.

    Args:
      params: the parameters.
      batch_BL: tokens, int32 [B, L].
      key: for dropout and rounding.
      config: the run, fitted to the mesh; k is its `accumulate_steps`.
      shardings: of the gradients, one for each parameter; left to XLA by default.

    Returns:
      (loss, gradients), in the parameters' types if k is 1, else in `accumulator_dtype`.
    """

    def place(tree):
        return tree if shardings is None else jax.lax.with_sharding_constraint(tree, shardings)

    def one(batch_BL, i):
        loss, grads = jax.value_and_grad(loss_fn)(
            params, batch_BL, jax.random.fold_in(key, i), config=config
        )
        return loss, place(grads)

    k = config.accumulate_steps
    micro_kBL = batch_BL.reshape(-1, k, batch_BL.shape[-1]).swapaxes(0, 1)
    if k == 1:
        return one(micro_kBL[0], 0)
    wide = at_least_float32(config.model.param_dtype)
    # MultiSteps serves as a running mean alone: it wraps the identity and is set to emit after
    # k + 1 micro-batches, so it never does, and the mean of k is read from its state. Wrapped
    # round the optimizer it would run it for every micro-batch and hold its state twice.
    running_mean = optax.MultiSteps(optax.identity(), k + 1, accumulator_dtype=wide)

    def add(state, inputs):
        loss, grads = one(*inputs)
        held = state.acc_grads
        state = state._replace(acc_grads=optax.tree.cast(held, wide))
        state = running_mean.update(optax.tree.cast(grads, wide), state)[1]
        rounded = round_tree(jax.random.fold_in(key, k + 1 + inputs[1]), state.acc_grads, held)
        return state._replace(acc_grads=place(rounded)), loss

    state = running_mean.init(params)
    state = state._replace(acc_grads=optax.tree.cast(state.acc_grads, accumulator_dtype(config)))
    state, losses = jax.lax.scan(add, state, (micro_kBL, jnp.arange(k)))
    return losses.mean(), state.acc_grads


def train_step(
    state: TrainState, batch_BL, learning_rate, *, config: TrainConfig, optimizer, shardings=None
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer update.

    If the loss or the gradient norm is not finite, or the norm is a spike (`spikes.judge`),
    parameters and optimizer state stay as they are and the update counts as skipped. The test comes
    before clipping, which would spread one NaN over all gradients.

    Args:
      state: the state, to be donated.
      batch_BL: tokens, int32 [B, L].
      learning_rate: of this update, a float32 scalar.
      config: the run, fitted to the mesh.
      optimizer: from `make_optimizer`.
      shardings: of the gradients, one for each parameter; left to XLA by default.

    Returns:
      The new state, and scalar metrics: loss, grad_norm, learning_rate, finite, skipped; with
      `optim.skip_spikes` also spike and median_norm.
    """
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    loss, grads = mean_over_micro_batches(
        state.params, batch_BL, key, config=config, shardings=shardings
    )
    grad_norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(loss.dtype), grads))
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    skip, window, of_spikes = ~finite, {}, {}
    if config.optim.skip_spikes:
        found, spike, median = spikes.judge(
            state.opt_state["spikes"], grad_norm, finite=finite, multiple=config.optim.skip_spikes
        )
        skip |= spike
        window, of_spikes = {"spikes": found}, {"spike": spike, "median_norm": median}
    params, opt_state = apply_gradients(
        optimizer,
        grads,
        state.opt_state,
        state.params,
        learning_rate=learning_rate,
        scale=jnp.minimum(1, config.optim.clip_norm / grad_norm),
        skip=skip,
        key=jax.random.fold_in(key, config.accumulate_steps),
    )
    skipped = state.skipped + jnp.where(skip, 1, 0)
    metrics = {
        "loss": loss,
        "grad_norm": grad_norm,
        "learning_rate": learning_rate,
        "finite": finite,
        "skipped": skipped,
    }
    return TrainState(state.step + 1, skipped, params, opt_state | window), metrics | of_spikes


def why_skipped(values: dict[str, Any]) -> str:
    """Why an update was skipped, from its metrics as numbers; empty if it was not."""
    loss, norm = values["loss"], values["grad_norm"]
    if not values["finite"]:
        return f"loss {loss}, gradient norm {norm}"
    if values.get("spike"):
        median = values["median_norm"]
        times = f"{norm / median:.1f} times the median {median:.3g}"
        return f"a spike, gradient norm {norm:.3g} is {times}"
    return ""


def trace_step(config: TrainConfig, mesh: Mesh, layout: Layout):
    """`train_step` of a run, traced; its state is donated.

    Args:
      config: the run, fitted to `mesh`.
      mesh: set by `sharding.on`.
      layout: from `make_layout`.
    """
    micro_batch_rows, left_over = divmod(config.batch_size, config.accumulate_steps)
    assert left_over == 0 and micro_batch_rows % batch_shards(mesh) == 0, "not fitted to the mesh"
    batch = jax.ShapeDtypeStruct(
        (config.batch_size, config.data.seq_len + 1), jnp.int32, sharding=rows(mesh)
    )
    everywhere = NamedSharding(mesh, P())
    learning_rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
    step = functools.partial(
        train_step,
        config=config,
        optimizer=make_optimizer(config),
        shardings=shardings_of(layout.gradients),
    )
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings_of(layout.state), everywhere))
    return jitted.trace(layout.state, batch, learning_rate)


def compile_step(config: TrainConfig, mesh: Mesh, layout: Layout) -> Any:
    """`train_step` of a run, compiled. Takes what `trace_step` takes.

    Raises:
      MachineFailure: the compiled step lacks cuDNN attention, or optimizer state in host memory,
        although the config asks for it.
    """
    start = time.perf_counter()
    say("compiling the training step ...")
    options = compile_options(mesh, param_count(config.model))
    compiled = trace_step(config, mesh, layout).lower().compile(compiler_options=options)
    say(f"compiled in {time.perf_counter() - start:.1f} s")
    return_freed_memory()
    memory, held = compiled.memory_analysis(), num_bytes(layout.state)
    in_place = memory.alias_size_in_bytes + memory.host_alias_size_in_bytes
    if in_place < held:
        say(
            f"WARNING: only {size(in_place)} of the state's {size(held)} on each device is updated "
            "in place; the rest is held twice"
        )
    if config.optim.state_memory == "pinned_host":
        check_offload(compiled.as_text())
    if config.model.uses_attention and attention_kernel(config.model) == "cudnn":
        check_fused_attention(compiled.as_text())
    return meeting_first(compiled)


def check_offload(program: str) -> None:
    """Raises `MachineFailure` if a compiled step keeps nothing in host memory.

    Args:
      program: its text. XLA marks arrays in host memory by `S(5)` in their layout.
    """
    layout = re.search(r"entry_computation_layout=.*", program)
    if layout is None or layout[0].count("S(5)") < 2:  # once as input, once as output
        raise MachineFailure(
            "optim.state_memory=pinned_host: the compiled step keeps no state in host memory; this "
            "platform does not support it, set optim.state_memory=device"
        )


def check_fused_attention(program: str) -> None:
    """Raises `MachineFailure` if a step lacks cuDNN's attention kernel, forward or backward.

    Args:
      program: its text, as StableHLO or compiled.
    """
    kernels = set(re.findall(r"__cudnn\$fmha\w+", program))
    missing = [
        direction
        for direction, backward in (("forward", False), ("backward", True))
        if not any(("Backward" in kernel) == backward for kernel in kernels)
    ]
    if missing:
        raise MachineFailure(
            f"the compiled step lacks cuDNN's attention kernel in its {' and '.join(missing)} pass "
            f"(found: {', '.join(sorted(kernels)) or 'none'}): report this, or set "
            "model.attention_kernel=xla to train without it"
        )
