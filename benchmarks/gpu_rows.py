"""The rows of gpu.py: what each measures, how long that may take, and which gaps it fills."""

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import loss
import numpy as np
from harness import (
    integrator_fn,
    interleaved,
    jax_contender,
    machine,
    make_parser,
    with_gradient,
)
from train import peak_memory, training

from inl_jax.config import InputError, ModelConfig, TrainConfig, with_fields
from inl_jax.config_file import load_config
from inl_jax.console import first_line
from inl_jax.model.language_model import init_decode_state, init_params
from inl_jax.model.platform.device import H100, made_for
from inl_jax.planning.memory import memory_needed
from inl_jax.planning.preflight import make_plan
from inl_jax.sampling import Sampling
from inl_jax.sampling.decoding import begin, pieces, prefill

Records = Iterator[dict[str, Any]]

TINY = {  # of a dry run
    "model.vocab_size": 300,
    "model.d_model": 32,
    "model.num_layers": 2,
    "model.d_ff": 64,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.max_seq_len": 32,
    "data.seq_len": 32,
    "batch_size": 4,
}

SIZES = ("small", "medium", "large", "xlarge", "4b")
REMATS = ("block", "all_but_integrator", "integrator", "none")  # by the memory that they take

fresh_params = jax.jit(init_params, static_argnums=0)


class Row(NamedTuple):
    """Measurements that share a process, and so its fate."""

    name: str
    seconds: int  # planned, from the start of the process to its end
    what: str
    measure: Callable[[bool], Records]  # yields cases as they are measured; True: tiny shapes
    fills: tuple[str, ...] = ()  # lines that say "not measured": their file and a word of theirs
    xla_flags: str = ""


def config_of(name: str, tiny: bool, fields: Mapping[str, Any]) -> TrainConfig:
    """A config of one device with fields replaced, and with the shapes of a dry run if `tiny`."""
    return with_fields(load_config(name), {"mesh.data": 1} | fields | (TINY if tiny else {}))


def attempt(case: str, records: Records) -> Records:
    """The records of a case, and why it failed if it did: the cases after it are measured too."""
    try:
        yield from records
    except jax.errors.JaxRuntimeError as error:  # out of memory, for one
        yield {"case": case, "failed": first_line(error)[:300]}


# --- the card


def device(tiny: bool) -> Records:
    """The rates that predictions assume (`cuda_program.CONSTANTS`), as this card reaches them."""
    if not tiny and "cuda" not in jax.devices()[0].client.platform_version:
        raise InputError(f"no CUDA device here, only {machine()}: try --dry_run, or a Hopper GPU")
    yield {"case": machine()}
    times, length, width, launches = (2, 256, 64, 10) if tiny else (50, 2**28, 8192, 1000)
    long, short = jnp.zeros(length), jnp.zeros(8)
    x, w = jax.random.normal(jax.random.key(0), (2, width, width), jnp.bfloat16)

    @jax.jit
    def stream(long):
        return jax.lax.fori_loop(0, times, lambda _, a: a + 1, long)

    @jax.jit
    def multiply(x, w):
        for _ in range(times):  # a loop would copy x in each turn
            x = x @ w
        return x

    @jax.jit
    def launch(short):
        for _ in range(launches):
            short = jax.lax.optimization_barrier(short + 1)
        return short

    contenders = {
        "stream": jax_contender(stream, long),
        "multiply": jax_contender(multiply, x, w * width**-0.5),
        "launch": jax_contender(launch, short),
    }
    seconds = {n: statistics.median(s) for n, s in interleaved(contenders, rounds=3).items()}
    yield {
        "case": "rates",
        "memory_tb_per_second": 1e-12 * times * 2 * long.nbytes / seconds["stream"],
        "bfloat16_tflop_per_second": 1e-12 * times * 2 * width**3 / seconds["multiply"],
        "us_per_launch": 1e6 * seconds["launch"] / launches,
    }


# --- training


def train(
    tiny: bool,
    *,
    name: str = "3b",
    case: str = "",
    sequences: int = 0,
    fields: Mapping[str, Any],
) -> Records:
    """Speed and memory of updates of two micro-batches: of more, both are the same.

    Args:
      tiny: whether the shapes are those of a dry run.
      name: of the config.
      case: of the record; the recipe by default.
      sequences: of a micro-batch; 0: as the run's recipe has them.
      fields: of the config, replaced.
    """
    config = make_plan(config_of(name, tiny, fields)).config
    sequences = sequences or config.batch_size // config.accumulate_steps
    config = with_fields(config, {"batch_size": 2 * sequences, "accumulate_steps": 2})
    recipe = f"{sequences} sequences at a time, remat {config.model.remat}"
    yield {"case": case or recipe} | updates(config, 2)


def updates(config: TrainConfig, number: int) -> dict[str, Any]:
    """Speed and memory of so many updates, without the peak if an earlier case's was higher."""
    before = peak_memory()[0]
    found = training(config, argparse.Namespace(warmup=1, updates=number))
    if found["peak_bytes"] <= before:
        del found["peak_bytes"]
    return found


def sizes(tiny: bool) -> Records:
    for name in ("small",) if tiny else SIZES:
        yield from attempt(name, train(tiny, name=name, case=name, fields={}))


def remats(tiny: bool) -> Records:
    fields = {"model.num_layers": 10, "model.num_iterations": 5}
    for remat in ("block",) if tiny else REMATS:
        case, more = f"remat {remat}", fields | {"model.remat": remat}
        yield from attempt(case, train(tiny, case=case, sequences=1, fields=more))


def offload(tiny: bool) -> Records:
    """How much longer an update takes if masters and moments are in host memory."""
    fields = {
        "model.num_layers": 8,
        "model.num_iterations": 1,
        "model.remat": "block",
        "data.seq_len": 512,
        "batch_size": 1,
        "accumulate_steps": 1,
    }
    plans = {  # the one that takes less of the device comes first
        memory: make_plan(config_of("3b_16gb", tiny, fields | {"optim.state_memory": memory}))
        for memory in ("pinned_host", "device")
    }
    seconds = {}
    for memory, plan in plans.items():
        found = updates(plan.config, 3)
        seconds[memory] = found["seconds_per_update"]
        yield {"case": f"state_memory {memory}"} | found
    moved = 2 * memory_needed(*plans["pinned_host"]).host_bytes  # there and back
    added = seconds["pinned_host"] - seconds["device"]
    rate = {"gb_per_second": 1e-9 * moved / added} if added > 0 else {}
    found = {"seconds_per_update": added, "moved_bytes": moved}
    yield {"case": "added by pinned_host"} | found | rate


def loss_chunks(tiny: bool) -> Records:
    sizes = "--d_model 32 --vocab_size 300 --tokens 64" if tiny else "--tokens 16384"
    for chunk in (16,) if tiny else (256, 1024, 2048, 4096):
        flags = f"{sizes} --dtype bfloat16 --chunk {chunk} --rounds 5".split()
        _, in_chunks = loss.loss(make_parser("loss", None), flags).rows
        yield {"case": f"chunks of {chunk}"} | in_chunks


# --- the integrator's kernels


def integrator_programs(
    tiny: bool, *, rows: int, tokens: int, num_iterations: int, kappa: float
) -> tuple[dict[str, dict[str, Callable]], tuple[jax.Array, ...]]:
    """The 3b's integrator by kernels, by XLA, and in float32, and (params, h, x) to call it with.

    Each is two programs, `forward(*arrays)` and `both(dy, *arrays)`, which also returns gradients.
    A dry run interprets the kernels.
    """

    def config(dtype, kernel) -> ModelConfig:
        fields = {
            "num_layers": 1,
            "num_iterations": num_iterations,
            "kappa": kappa,
            "param_dtype": "float32",
            "remat": "none",
            "compute_dtype": dtype,
            "integrator_kernel": kernel,
        }
        return config_of("3b", tiny, {f"model.{n}": value for n, value in fields.items()}).model

    def programs_of(dtype, kernel):
        forward = integrator_fn(config(dtype, kernel))

        def run(function, *arrays):  # a function with its gradient: both are traced in the stack
            with ExitStack() as stack:
                if tiny:
                    from inl_jax.model.mosaic.tiles import interpreted

                    stack.enter_context(made_for(H100))
                    stack.enter_context(interpreted())
                if dtype == "float32":  # GPUs would round the operands to TF32
                    stack.enter_context(jax.default_matmul_precision("highest"))
                return function(*arrays)

        functions = {"forward": forward, "both": with_gradient(forward)}
        return {name: jax.jit(functools.partial(run, f)) for name, f in functions.items()}

    c = config("float32", "xla")
    blocks = fresh_params(c, jax.random.key(0))["blocks"]
    params = jax.tree.map(lambda p: p[0], blocks["integrator"])
    h_BSD, x_BSD = jax.random.normal(jax.random.key(1), (2, rows, tokens, c.d_model))
    programs = {
        "mosaic": programs_of("bfloat16", "mosaic"),
        "xla": programs_of("bfloat16", "xla"),
        "float32": programs_of("float32", "xla"),
    }
    return programs, (params, h_BSD, x_BSD)


def kernels_equal(tiny: bool) -> Records:
    """How far kernels and XLA's form are from float32, and calls of the kernels from each other.

    Equal means that no array is farther from float32 than 1.5 times what XLA's form is. A race
    between threads and copies would make calls differ.
    """
    cases = [(1, 64, 1.0), (1, 100, math.inf), (3, 1111, 1.0), (4, 4096, math.inf)]
    for rows, tokens, kappa in cases[1:2] if tiny else cases:
        programs, arrays = integrator_programs(
            tiny, rows=rows, tokens=tokens, num_iterations=1 if tiny else 3, kappa=kappa
        )
        dy = jax.random.normal(jax.random.key(2), arrays[1].shape)
        found = {name: of["both"](dy, *arrays) for name, of in programs.items()}
        forward, gradients = {}, {}
        for name in ("mosaic", "xla"):
            y_error, grad_errors = relative_errors(found[name], found["float32"])
            forward[name] = y_error
            gradients[name] = leaves_by_path(grad_errors)
        wrong = [n for n, e in gradients["mosaic"].items() if e > 1.5 * gradients["xla"][n] + 1e-6]
        if forward["mosaic"] > 1.5 * forward["xla"] + 1e-6:
            wrong.insert(0, "the state")
        again = [programs["mosaic"]["both"](dy, *arrays) for _ in range(1 if tiny else 5)]
        differences = [max(jax.tree.leaves(relative_errors(a, found["mosaic"]))) for a in again]
        yield {
            "case": f"{rows} x {tokens} tokens, kappa {kappa:g}",
            "equal": f"no: {', '.join(wrong)}" if wrong else "yes",
            "state_error": forward["mosaic"],
            "state_error_of_xla": forward["xla"],
            "gradient_error": max(gradients["mosaic"].values()),
            "gradient_error_of_xla": max(gradients["xla"].values()),
            "difference_between_calls": max(differences),
        }


def relative_errors(found: Any, exact: Any) -> Any:
    """||found - exact|| / ||exact|| of each array in a tree. Not a number is infinitely far."""

    def of_leaf(a, b):
        error = jnp.linalg.norm((a - b).ravel()) / jnp.maximum(jnp.linalg.norm(b.ravel()), 1e-30)
        return float(error) if jnp.isfinite(error) else math.inf

    return jax.tree.map(of_leaf, found, exact)


def leaves_by_path(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def kernels_time(tiny: bool) -> Records:
    rows, tokens, T = (1, 64, 1) if tiny else (4, 4096, 15)
    programs, arrays = integrator_programs(
        tiny, rows=rows, tokens=tokens, num_iterations=T, kappa=1.0
    )
    for name in ("xla", "mosaic"):
        forward = jax_contender(programs[name]["forward"], *arrays)
        both = jax_contender(programs[name]["both"], arrays[2], *arrays)
        contenders = {"forward": forward, "forward_and_backward": both}
        seconds = interleaved(contenders, rounds=1 if tiny else 5)
        yield {"case": name} | {
            f"{what}_ns_per_token_and_iteration": 1e9 * statistics.median(s) / rows / tokens / T
            for what, s in seconds.items()
        }


# --- generation


def decode(tiny: bool, *, context: str) -> Records:
    """Decoding after prompts of two lengths, then prefill.

    The prompts are not read before decoding: its time does not depend on what the cache holds.
    """
    c = config_of("3b", tiny, {"model.context": context}).model
    params = fresh_params(c, jax.random.key(0))
    new, early, late, most = (4, 3, 20, 32) if tiny else (32, 100, 4000, 4096)
    for batch_size, position, room in (
        (1, early, most),
        (1, late, most),
        (64, early, most),
        (64, late, most),
        (256, early, early + new),  # keys and values of 256 x 4096 tokens would take 80 GiB
    ):
        case = f"batch {batch_size}, position {position}"
        run = functools.partial(decoding_seconds, c, params, batch_size, position, room, new)
        yield from attempt(case, speed(case, run, batch_size * new))
    for batch_size, length in ((64, early), (1, late)):
        case = f"prefill of {batch_size} x {length}"
        run = functools.partial(prefill_seconds, c, params, batch_size, length)
        yield from attempt(case, speed(case, run, batch_size * length))


def speed(case: str, run: Callable[[], float], tokens: int) -> Records:
    """Tokens per second of a call that takes `run()` seconds."""
    run()  # compiles
    yield {"case": case, "tokens_per_second": tokens / run()}


def decoding_seconds(
    config: ModelConfig, params, batch_size: int, position: int, room: int, new_tokens: int
) -> float:
    """Seconds to decode tokens greedily in one loop, from `position` on."""
    state = init_decode_state(config, batch_size, room if config.uses_attention else 0)
    state = state._replace(position_B=jnp.full(batch_size, position, jnp.int32))
    how, num_ids = Sampling(), config.vocab_size
    rows = begin(
        jnp.zeros((batch_size, num_ids)), state, [[0]] * batch_size, how, seed=0, num_ids=num_ids
    )
    jax.block_until_ready(rows)
    start = time.perf_counter()
    list(
        pieces(
            config,
            params,
            rows,
            how,
            size=new_tokens,
            max_new_tokens=new_tokens,
            end_id=None,
            num_ids=num_ids,
            mesh=None,
        )
    )
    return time.perf_counter() - start


def prefill_seconds(config: ModelConfig, params, batch_size: int, length: int) -> float:
    ids_BP = np.random.default_rng(0).integers(config.vocab_size, size=(batch_size, length))
    start = time.perf_counter()
    found = prefill(config, params, ids_BP, np.full(batch_size, length), max_len=length)
    jax.block_until_ready(found)
    return time.perf_counter() - start


# --- the plan


def _train(**fields: Any) -> Callable[[bool], Records]:
    named = {f"model.{name}": value for name, value in fields.items()}
    return functools.partial(train, fields=named)


_REDUCED = _train(num_layers=4, num_iterations=5)
_NO_HIDING = "--xla_gpu_enable_latency_hiding_scheduler=false"

ROWS = (  # the most important first; `device` says whether there is a GPU
    Row("device", 15, "rates that predictions assume", device),
    Row(
        "train",
        65,
        "training the 3b, T 15, integrator by XLA",
        _train(integrator_kernel="xla"),
        fills=(
            "README.md GPU",
            "configs/3b.py Time",
            "docs/benchmarks.md on a GPU",
            "docs/benchmarks.md H100 | 15",
            "docs/memory.md peak memory",
        ),
    ),
    Row(
        "kernels_equal",
        45,
        "kernels beside XLA's form and float32, T 3",
        kernels_equal,
        xla_flags="--xla_gpu_autotune_level=0",  # many programs, whose speed does not matter
    ),
    Row(
        "train_mosaic",
        55,
        "training the 3b, T 15, integrator by kernels",
        _train(integrator_kernel="mosaic"),
    ),
    Row(
        "train_plain",
        35,
        "training the 3b without the integrator",
        _train(num_iterations=0),
        fills=("docs/benchmarks.md H100 | 0",),
    ),
    Row("kernels_time", 40, "one integrator of the 3b, T 15, 4 x 4096 tokens", kernels_time),
    Row(
        "decode",
        45,
        "generating with the 3b, decay",
        functools.partial(decode, context="decay"),
        fills=("docs/benchmarks.md H100 | 1, 64, 256",),
    ),
    Row(
        "decode_attention",
        45,
        "generating with the 3b, attention",
        functools.partial(decode, context="attention"),
    ),
    Row(
        "offload",
        30,
        "masters and moments on the host, 8 layers of the 3b, T 1",
        offload,
        fills=("docs/memory.md offload", "configs/3b_16gb.py Time"),
    ),
    Row(
        "loss",
        20,
        "the loss with its gradient, 16,384 tokens",
        loss_chunks,
        fills=("docs/benchmarks.md chunks",),
    ),
    Row("flags", 15, "4 layers of the 3b, T 5", _REDUCED, xla_flags=_NO_HIDING),
    Row(
        "no_command_buffers",
        15,
        "the same without command buffers",
        _REDUCED,
        xla_flags=f"{_NO_HIDING} --xla_gpu_enable_command_buffer=",
    ),
    Row(
        "latency_hiding",
        15,
        "the same with the scheduler that hides latency",
        _REDUCED,
        xla_flags="--xla_gpu_enable_latency_hiding_scheduler=true",
    ),
    Row(
        "remat",
        45,
        "10 layers of the 3b, T 5, one sequence at a time",
        remats,
        fills=("docs/memory.md recipes",),
    ),
    Row(
        "sizes",
        50,
        "training the other sizes",
        sizes,
        fills=tuple(f"configs/{name}.py Time" for name in SIZES),
    ),
)
