"""Predicts memory, time, rent and energy of a run, and what devices send, without a device.

inl estimate --config 3b [--device rtx4090] [--devices 8] [--compile [cuda]] [--json]
    [--tokens 50e9] [--gpus all | NAME ...] [--mfu .3 | --mfu_from RUN] [--price USD] [--watts W]
    [--section.field value ...]

Nothing is allocated. accumulate_steps auto and model.remat auto are chosen for --device, and for
each of --gpus. Without --compile the state is computed from its shapes and the rest is
estimated. With it the whole step is compiled for as many devices, by XLA for CPUs or, with
inl_jax[cuda] installed and without a GPU, for H100s; and the bytes that devices send in one update
are counted. (For CPUs XLA adds 16-bit gradients in float32, and by all-reduce.)
Time follows from the arithmetic of the tokens and the share of the GPU's peak (MFU); rent and
energy from inl_jax/planning/hardware.py (docs/cost.md). In JSON the figures of --device stand at
the top, and those of --gpus in the list `gpus`.
Exit code 2: the run does not fit.
"""

import dataclasses
import math
from collections.abc import Sequence

from inl_jax.config import InputError
from inl_jax.console import count, duration, plural, show, size
from inl_jax.failures import EXIT_MISTAKE
from inl_jax.files import json_text
from inl_jax.terminal import signals
from inl_jax.terminal.command_line import Parser, from_command_line

# The fields that most people need.
FIRST = """batch_size accumulate_steps data.seq_len model.context model.remat
model.integrator_segment optim.optimizer optim.moment_dtype optim.state_memory mesh.data mesh.fsdp
mesh.tensor""".split()

# The least and the greatest value of a flag.
RANGES = {
    "devices": (1, 1e5),
    "tokens": (1, 1e18),
    "mfu": (1e-4, 1),
    "price": (0, 1e6),
    "watts": (0, 1e6),
}


def main(argv: Sequence[str]) -> int:
    """The verb; returns the exit code."""
    config, flags = from_command_line(make_parser(), argv, first=FIRST)
    check(flags)
    import jax

    from inl_jax.model.platform.kernels import check_kernels
    from inl_jax.parallel.sharding import make_mesh, on
    from inl_jax.planning.hardware import find_gpu
    from inl_jax.planning.programs.xla import use_no_device
    from inl_jax.training.state import make_layout

    signals.unwind()
    use_no_device(flags.compile or "cpu")
    gpu = find_gpu(flags.device)
    jax.config.update("jax_num_cpu_devices", flags.devices)
    wanted = math.prod(n for n in dataclasses.asdict(config.mesh).values() if isinstance(n, int))
    if wanted > flags.devices:
        raise InputError(
            f"--devices {flags.devices}: the mesh has {wanted} devices; add --devices {wanted}"
        )
    mesh = make_mesh(config.mesh, devices=jax.devices("cpu"))
    with as_on(gpu, flags):  # from here on: a GPU of this machine must not be started
        with on(mesh):
            check_kernels(config.model)
        layout = make_layout(config, mesh)
        record = make_record(config, flags, gpu, mesh, layout)
        record |= budgets(config, flags, gpu, mesh, layout, record)
        if flags.json:
            show(json_text(record))
        else:
            show_memory(config, flags, gpu, mesh, record)
            show_budgets(flags, record)
    return 0 if record["fits"] else EXIT_MISTAKE


def make_parser() -> Parser:
    """The flags of the verb itself."""
    parser = Parser("estimate", __doc__, add_help=False)
    parser.add_argument("--device", default="h100-80gb", help="the GPU that has to hold it")
    parser.add_argument("--devices", type=int, default=1, help="how many, as a virtual mesh")
    parser.add_argument(
        "--compile",
        nargs="?",
        choices=("cpu", "cuda"),
        const="cpu",
        help="also ask this compiler; cpu if none is named",
    )
    parser.add_argument("--tokens", type=float, help="to train on; those of the run by default")
    parser.add_argument("--gpus", nargs="+", default=[], help="GPUs to compare, or all")
    parser.add_argument("--mfu", type=float, help="share of the GPU's peak, at most 1")
    parser.add_path("--mfu_from", metavar="RUN", help="a run that has measured it")
    parser.add_argument("--price", type=float, metavar="USD", help="of one GPU for an hour")
    parser.add_argument("--watts", type=float, help="of one GPU")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    return parser


def check(flags) -> None:
    """Raises `InputError` for a number out of its range, or flags that exclude each other."""
    for name, (least, most) in RANGES.items():
        value = getattr(flags, name)
        if value is not None and not least <= value <= most:
            raise InputError(f"--{name} {value}: must be from {least:g} to {most:g}")
    if flags.mfu is not None and flags.mfu_from is not None:
        raise InputError(f"--mfu {flags.mfu} with --mfu_from {flags.mfu_from}: give one of them")


def as_on(gpu, flags):
    """What is traced inside is made for the GPU, but for the CPU if that is to compile it."""
    from inl_jax.model.platform.device import Device, made_for

    return made_for(None if flags.compile == "cpu" else Device("gpu", gpu.capability))


def fitted(config, gpu, mesh, layout) -> tuple:
    """The run as it would be computed on such GPUs, and the memory that it needs."""
    from inl_jax.parallel.sharding import fit_to_mesh
    from inl_jax.planning.memory import memory_needed
    from inl_jax.planning.recipe import choose

    config = choose(fit_to_mesh(config, mesh), mesh, layout, gpu.usable_memory)
    return config, memory_needed(config, mesh, layout)


def make_record(asked, flags, gpu, mesh, layout) -> dict:
    """All that was found, in bytes, as `--json` prints it."""
    from inl_jax.planning import memory
    from inl_jax.planning.memory_advice import as_flags, smallest_change
    from inl_jax.planning.programs.collectives import find_collectives, least_bytes, summed
    from inl_jax.planning.programs.xla import compile_abstractly
    from inl_jax.planning.recipe import explain

    config, needed = fitted(asked, gpu, mesh, layout)
    device_bytes, host_bytes = needed.device_bytes, needed.host_bytes
    record = {"parts": needed.device, "host_parts": needed.host, "estimated_bytes": device_bytes}
    if flags.compile:
        program = compile_abstractly(config, mesh, layout, flags.compile)
        device_bytes, host = memory.compiled_bytes(program.memory)
        host_bytes = host or host_bytes  # the CPU's compiler counts it with the rest
        if not host:
            device_bytes -= host_bytes
        sent = summed(find_collectives(program.text, mesh))
        record |= {
            "sent_bytes": sum(num_bytes for _, num_bytes in sent.values()),
            "least_bytes": least_bytes(config, mesh),
            "sent": [
                {"kind": kind, "axes": axes, "times": times, "bytes": num_bytes}
                for (kind, axes), (times, num_bytes) in sent.items()
            ],
        }
    usable = gpu.usable_memory
    fits = device_bytes <= usable
    # If the compiler asks for more than was estimated, it will do so after a change as well.
    allowed = usable * needed.device_bytes / device_bytes
    change = None if fits else smallest_change(asked, mesh, allowed)
    return record | {
        "accumulate_steps": config.accumulate_steps,
        "remat": config.model.remat,
        "recipe": explain(asked, config, mesh, layout, usable),
        "activations_by_remat": memory.activations_by_remat(config, mesh),
        "config": config.name,
        "device": gpu.name,
        "devices": flags.devices,
        "mesh": dict(mesh.shape),
        "compiler": flags.compile,
        "device_bytes": device_bytes,
        "host_bytes": host_bytes,
        "usable_bytes": usable,
        "fits": fits,
        "change": None if change is None else as_flags(change),
    }


def show_memory(config, flags, gpu, mesh, record) -> None:
    """Prints the record for people."""
    from inl_jax.planning.preflight import describe_model

    show(describe_model(config))
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    micro_batches = plural(record["accumulate_steps"], "micro-batch")
    show(record["recipe"])
    show(f"on each of {mesh.size} x {gpu.name} ({axes}), {micro_batches}:")
    for part, num_bytes in record["parts"].items():
        if num_bytes:
            show(f"  {part:25} {size(num_bytes):>12}")
    show(f"  {'all':25} {size(record['estimated_bytes']):>12}")
    by_remat = record["activations_by_remat"]
    show("  activations by remat: " + ", ".join(f"{m} {size(b)}" for m, b in by_remat.items()))
    if flags.compile:
        compiler = {"cpu": "for CPUs", "cuda": "for H100s"}[flags.compile]
        show(f"  {'as compiled ' + compiler:25} {size(record['device_bytes']):>12}")
    for part, num_bytes in record["host_parts"].items():
        show(f"  {part + ' on the host':25} {size(num_bytes):>12}")
    usable, card = size(record["usable_bytes"]), f"{gpu.memory:,} MiB"
    show(f"  {'usable':25} {usable:>12}  of {card}, with XLA_PYTHON_CLIENT_MEM_FRACTION=.95")
    if flags.compile and mesh.size > 1:
        show("each sends in one update:")
        for row in record["sent"]:
            what = f"{row['kind']} over {row['axes']}"
            show(f"  {what:32} {row['times']:>7,} times {row['bytes'] / 1e9:>10.3f} GB")
        show(f"  {'all':32} {'':13} {record['sent_bytes'] / 1e9:>10.3f} GB")
        show(f"  {'the least, beside tensor':32} {'':13} {record['least_bytes'] / 1e9:>10.3f} GB")
    if record["fits"]:
        show("it fits" + ("" if flags.compile else " by the estimate"))
    elif record["change"] is None:
        show("it does not fit, whatever is changed: more devices or a smaller config are needed")
    else:
        show(f"it does not fit; the smallest change that makes it fit: {record['change']}")


def budgets(config, flags, gpu, mesh, layout, record) -> dict:
    """Tokens, time, rent and energy, as `--json` prints them; empty if the tokens are not known."""
    from inl_jax.model.language_model import param_count
    from inl_jax.planning.budget import ASSUMED_MFU, budget, measured_mfu
    from inl_jax.planning.hardware import GPUS, find_gpu

    tokens = flags.tokens or config.num_steps * config.batch_size * config.data.seq_len
    if not tokens:  # counted in epochs of data that is not looked at here
        return {}
    if tokens > RANGES["tokens"][1]:
        raise InputError(f"num_steps={config.num_steps}: that is above 1e18 tokens; lower it")
    mfu, source = ASSUMED_MFU, "assumed"
    if flags.mfu is not None:
        mfu, source = flags.mfu, "given"
    elif flags.mfu_from is not None:
        mfu, source = measured_mfu(flags.mfu_from), f"measured in {flags.mfu_from}"

    def row(gpu) -> dict:
        if flags.price is not None:
            gpu = dataclasses.replace(gpu, price=flags.price, price_source="--price")
        if flags.watts is not None:
            gpu = dataclasses.replace(gpu, power=flags.watts)
        with as_on(gpu, flags):
            on_gpu, needed = fitted(config, gpu, mesh, layout)
        # As much more than estimated as the compiler asks for on --device.
        compiled = record["device_bytes"] / record["estimated_bytes"]
        device_bytes = round(needed.device_bytes * compiled)
        found = budget(config, tokens, gpu, flags.devices, mfu=mfu, mfu_source=source)
        return found._asdict() | {
            "accumulate_steps": on_gpu.accumulate_steps,
            "remat": on_gpu.model.remat,
            "device_bytes": device_bytes,
            "price_per_hour": gpu.price,
            "price_source": gpu.price_source,
            "watts": gpu.power,
            "usable_bytes": gpu.usable_memory,
            "fits": device_bytes <= gpu.usable_memory,
        }

    compared = GPUS if "all" in flags.gpus else [find_gpu(n, "--gpus") for n in flags.gpus]
    return {
        "tokens": tokens,
        "tokens_per_parameter": tokens / param_count(config.model),
        "gpus": [row(other) for other in compared],
    } | row(gpu)


def show_budgets(flags, record) -> None:
    """Prints tokens and costs for people."""
    from inl_jax.planning.budget import TOKENS_PER_PARAMETER, guide_minimum

    if "tokens" not in record:
        show("num_epochs decides how long the run is: --tokens N adds its time, rent and energy")
        return
    tokens, ratio = record["tokens"], record["tokens_per_parameter"]
    show(
        f"{count(tokens)} tokens, {ratio:.3g} per parameter ({TOKENS_PER_PARAMETER} are usual: "
        f"{count(TOKENS_PER_PARAMETER * tokens / ratio)}), {record['flops']:.3g} FLOPs"
    )
    least = guide_minimum(tokens / ratio)
    if least is not None and tokens < least:
        show(f"the published guide advises {count(least)} tokens or more")
    show(
        f"at {100 * record['mfu']:.3g}% MFU, {record['mfu_source']}"
        + ("; none is measured on a GPU yet" if record["mfu_source"] == "assumed" else "")
    )
    rows = record["gpus"] or [record]
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        show(f"  {row['count']} x {row['name']:{width}}  {_costs(row)}")
    for source in dict.fromkeys(row["price_source"] for row in rows if row["price"] is not None):
        names = ", ".join(row["name"] for row in rows if row["price_source"] == source)
        show(f"price of {names}: {source}")


def _costs(row) -> str:
    if not row["fits"]:
        needed, usable = size(row["device_bytes"]), size(row["usable_bytes"])
        return f"does not fit: needs {needed}, usable {usable}"
    if row["hours"] is None:
        return "its bfloat16 peak is not published"
    price = "price not known"
    if row["price"] is not None:
        price = f"{_at_least(0.01, row['price'], '${:,.2f}')} at ${row['price_per_hour']:.2f}/h"
    kwh = _at_least(0.1, row["kwh"], "{:,.1f} kWh")
    time = duration(max(1, 3600 * row["hours"]))
    return (
        f"{row['tokens_per_second']:>9,.0f} tokens/s  {time:>8}  {price:>24}  {kwh:>12} at "
        f"{row['watts']:g} W"
    )


def _at_least(least: float, value: float, form: str) -> str:
    """`value` as text, or that it is below `least`: no figure rounds to 0."""
    return form.format(value) if value >= least else "under " + form.format(least)
