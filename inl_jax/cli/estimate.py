"""Predicts what a run needs of each device's memory and what devices send, without a device.

inl estimate --config 3b [--device rtx4090] [--devices 8] [--compile [cuda]] [--json]
    [--section.field value ...]

Nothing is allocated. Without --compile the state is computed from its shapes and the rest is
estimated. With it the whole step is compiled for as many devices, by XLA for CPUs or, with
inl_jax[cuda] installed and without a GPU, for H100s; and the bytes that devices send in one update
are counted. (For CPUs XLA adds 16-bit gradients in float32, and by all-reduce.)
Exit code 2: the run does not fit.
"""

import dataclasses
import json
import math
from collections.abc import Sequence

from inl_jax.cli import signals
from inl_jax.cli.command_line import Parser, from_command_line
from inl_jax.config import InputError
from inl_jax.console import plural, size
from inl_jax.training.stop import EXIT_MISTAKE


def main(argv: Sequence[str]) -> int:
    """The verb; returns the exit code."""
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
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    config, flags = from_command_line(parser, argv)
    if flags.devices < 1:
        raise InputError(f"--devices {flags.devices}: must be positive")
    import jax

    from inl_jax.parallel.sharding import fit_to_mesh, make_mesh
    from inl_jax.planning import memory
    from inl_jax.planning.hardware import find_gpu
    from inl_jax.planning.xla import use_no_device
    from inl_jax.training.state import make_layout

    signals.unwind()
    use_no_device(flags.compile or "cpu")
    gpu = find_gpu(flags.device)
    jax.config.update("jax_num_cpu_devices", flags.devices)
    if flags.compile != "cpu" and config.model.compute_dtype == "auto":  # as on a GPU
        model = dataclasses.replace(config.model, compute_dtype="bfloat16")
        config = dataclasses.replace(config, model=model)
    wanted = math.prod(n for n in dataclasses.asdict(config.mesh).values() if isinstance(n, int))
    if wanted > flags.devices:
        raise InputError(
            f"--devices {flags.devices}: the mesh has {wanted} devices; add --devices {wanted}"
        )
    mesh = make_mesh(config.mesh, devices=jax.devices("cpu"))
    config = fit_to_mesh(config, mesh)
    layout = make_layout(config, mesh)
    needed = memory.memory_needed(config, mesh, layout)
    record = make_record(config, flags, gpu, mesh, layout, needed)
    if flags.json:
        print(json.dumps(record))
    else:
        show(config, flags, gpu, mesh, needed, record)
    return 0 if record["fits"] else EXIT_MISTAKE


def make_record(config, flags, gpu, mesh, layout, needed) -> dict:
    """All that was found, in bytes, as `--json` prints it."""
    from inl_jax.planning import memory
    from inl_jax.planning.collectives import find_collectives, least_bytes, summed
    from inl_jax.planning.xla import compile_abstractly

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
    change = None if fits else memory.smallest_change(config, mesh, allowed)
    return record | {
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
        "change": None if change is None else memory.as_flags(change),
    }


def show(config, flags, gpu, mesh, needed, record) -> None:
    """Prints the record for people."""
    from inl_jax.planning.preflight import describe_model

    print(describe_model(config))
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    micro_batches = plural(config.accumulate_steps, "micro-batch")
    print(f"on each of {mesh.size} x {gpu.name} ({axes}), {micro_batches}:")
    for part, num_bytes in needed.device.items():
        if num_bytes:
            print(f"  {part:25} {size(num_bytes):>12}")
    print(f"  {'all':25} {size(needed.device_bytes):>12}")
    by_remat = record["activations_by_remat"]
    print("  activations by remat: " + ", ".join(f"{m} {size(b)}" for m, b in by_remat.items()))
    if flags.compile:
        compiler = {"cpu": "for CPUs", "cuda": "for H100s"}[flags.compile]
        print(f"  {'as compiled ' + compiler:25} {size(record['device_bytes']):>12}")
    for part, num_bytes in needed.host.items():
        print(f"  {part + ' on the host':25} {size(num_bytes):>12}")
    usable, card = size(record["usable_bytes"]), f"{gpu.memory:,} MiB"
    print(f"  {'usable':25} {usable:>12}  of {card}, with XLA_PYTHON_CLIENT_MEM_FRACTION=.95")
    if flags.compile and mesh.size > 1:
        print("each sends in one update:")
        for row in record["sent"]:
            what = f"{row['kind']} over {row['axes']}"
            print(f"  {what:32} {row['times']:>7,} times {row['bytes'] / 1e9:>10.3f} GB")
        print(f"  {'all':32} {'':13} {record['sent_bytes'] / 1e9:>10.3f} GB")
        print(f"  {'the least, beside tensor':32} {'':13} {record['least_bytes'] / 1e9:>10.3f} GB")
    if record["fits"]:
        print("it fits" + ("" if flags.compile else " by the estimate"))
    elif record["change"] is None:
        print("it does not fit, whatever is changed: more devices or a smaller config are needed")
    else:
        print(f"it does not fit; the smallest change that makes it fit: {record['change']}")
