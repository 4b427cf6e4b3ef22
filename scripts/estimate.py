"""What a run needs of each device's memory and what devices send, before there is a device.

python scripts/estimate.py --config configs/3b.py [--device rtx4090] [--devices 8]
    [--compile [cuda]] [--json] [--section.field value ...]

Nothing is allocated. Without --compile the state is from shapes and the rest estimated. With it the
whole step is compiled for as many devices: by XLA for the CPU or, with inl_jax[cuda] installed and
no GPU needed, for H100s; and what they send each other in one update is counted. (For CPUs XLA adds
16-bit gradients in float32, and by all-reduce.) Exit code 2: it does not fit.
"""

import argparse
import dataclasses
import json
import sys

from inl_jax.cli.command_line import exit_on_input_error, from_command_line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, add_help=False)
    parser.add_argument("--device", default="h100-80gb", help="what has to hold it")
    parser.add_argument("--devices", type=int, default=1, help="how many, as a virtual mesh")
    parser.add_argument(
        "--compile",
        nargs="?",
        choices=("cpu", "cuda"),
        const="cpu",
        help="ask this compiler, too (cpu where none is named)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    config, flags = from_command_line(parser)
    import jax

    from inl_jax import console
    from inl_jax.config import InputError
    from inl_jax.parallel.sharding import fit_to_mesh, make_mesh
    from inl_jax.planning import memory
    from inl_jax.planning.collectives import find_collectives, least_bytes, summed
    from inl_jax.planning.hardware import find_gpu
    from inl_jax.planning.preflight import describe_model
    from inl_jax.planning.xla import compile_abstractly, use_no_device
    from inl_jax.training.state import make_layout

    use_no_device(flags.compile or "cpu")

    with exit_on_input_error():
        gpu = find_gpu(flags.device)
        if flags.devices < 1:
            raise InputError(f"--devices {flags.devices}: must be positive")
        jax.config.update("jax_num_cpu_devices", flags.devices)
        if flags.compile != "cpu" and config.model.compute_dtype == "auto":  # as on a GPU
            model = dataclasses.replace(config.model, compute_dtype="bfloat16")
            config = dataclasses.replace(config, model=model)
        mesh = make_mesh(config.mesh, devices=jax.devices("cpu"))
        config = fit_to_mesh(config, mesh)
        layout = make_layout(config, mesh)
        needed = memory.memory_needed(config, mesh, layout)
        device_bytes, host_bytes = needed.device_bytes, needed.host_bytes
        record = {
            "parts": needed.device,
            "host_parts": needed.host,
            "estimated_bytes": device_bytes,
        }
        if flags.compile:
            program = compile_abstractly(config, mesh, layout, flags.compile)
            device_bytes, host = memory.compiled_bytes(program.memory)
            host_bytes = host or host_bytes  # the CPU's compiler counts it with the rest
            if not host:
                device_bytes -= host_bytes
            sent = summed(find_collectives(program.text, mesh))
            record |= {
                "sent_bytes": sum(size for _, size in sent.values()),
                "least_bytes": least_bytes(config, mesh),
                "sent": [
                    {"kind": kind, "axes": axes, "times": times, "bytes": size}
                    for (kind, axes), (times, size) in sent.items()
                ],
            }
        usable = gpu.usable_memory
        fits = device_bytes <= usable
        # Where the compiler asks for more than was estimated, so it will after a change.
        allowed = usable * needed.device_bytes / device_bytes
        change = None if fits else memory.smallest_change(config, mesh, allowed)
        by_remat = memory.activations_by_remat(config, mesh)
    record |= {
        "activations_by_remat": by_remat,
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
    if flags.json:
        print(json.dumps(record))
        return 0 if fits else 2
    print(describe_model(config))
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    micro_batches = console.plural(config.accumulate_steps, "micro-batch")
    print(f"on each of {mesh.size} x {gpu.name} ({axes}), {micro_batches}:")
    for part, size in needed.device.items():
        if size:
            print(f"  {part:25} {console.size(size):>12}")
    print(f"  {'all':25} {console.size(needed.device_bytes):>12}")
    print(
        "  activations by remat: "
        + ", ".join(f"{m} {console.size(b)}" for m, b in by_remat.items())
    )
    if flags.compile:
        compiler = {"cpu": "for CPUs", "cuda": "for H100s"}[flags.compile]
        print(f"  {'as compiled ' + compiler:25} {console.size(device_bytes):>12}")
    for part, size in needed.host.items():
        print(f"  {part + ' on the host':25} {console.size(size):>12}")
    print(
        f"  {'usable':25} {console.size(usable):>12}  of {gpu.memory:,} MiB, with "
        "XLA_PYTHON_CLIENT_MEM_FRACTION=.95"
    )
    if flags.compile and mesh.size > 1:
        print("each sends in one update:")
        for row in record["sent"]:
            what = f"{row['kind']} over {row['axes']}"
            print(f"  {what:32} {row['times']:>7,} times {row['bytes'] / 1e9:>10.3f} GB")
        print(f"  {'all':32} {'':13} {record['sent_bytes'] / 1e9:>10.3f} GB")
        print(f"  {'the least, beside tensor':32} {'':13} {record['least_bytes'] / 1e9:>10.3f} GB")
    if fits:
        print("it fits" + ("" if flags.compile else " by the estimate"))
    elif change is None:
        print("it does not fit, whatever is changed: more devices or a smaller config are needed")
    else:
        print(f"it does not fit; the smallest change that makes it fit: {memory.as_flags(change)}")
    return 0 if fits else 2


if __name__ == "__main__":
    sys.exit(main())
