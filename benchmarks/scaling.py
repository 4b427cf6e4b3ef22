"""Predicts the time of an update on 1 to 512 GPUs: from bytes counted in the compiled step and from
published bandwidths. Nothing runs on a GPU and nothing is measured.

python scripts/scaling.py --config configs/3b.py [--meshes 1x1x1 1x8x1 8x8x1 64x8x1]
    [--sequences_per_device 1] [--tokens_per_second 18400] [--compile cuda] [--json]

A mesh is data x fsdp x tensor. A device has --sequences_per_device in a micro-batch; an update has
batch_size sequences, or more where so many devices need more. --tokens_per_second is what one GPU
computes alone; the default is the ceiling of the 3b on an H100 (docs/benchmarks.md).
"""

import argparse
import dataclasses
import json
import math
import sys

from inl_jax.cli.command_line import exit_on_input_error, from_command_line
from inl_jax.config import MeshConfig

NODE = 8  # GPUs
NVLINK = 450e9  # bytes/s that an H100 sends to its node (NVIDIA's data sheet: 900 both ways)
NETWORK = 50e9  # bytes/s that each GPU's own 400 Gb/s adapter sends to other nodes (DGX H100)
LATENCY = 20e-6  # seconds until a collective begins to move data; assumed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, add_help=False)
    parser.add_argument("--meshes", nargs="+", default=["1x1x1", "1x8x1", "8x8x1", "64x8x1"])
    parser.add_argument("--sequences_per_device", type=int, default=1, help="in a micro-batch")
    parser.add_argument("--tokens_per_second", type=float, default=18400, help="of one GPU alone")
    parser.add_argument("--compile", choices=("cpu", "cuda"), default="cuda", help="by which XLA")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    with exit_on_input_error():
        config, flags = from_command_line(parser)
    import jax

    from inl_jax.planning.xla import use_no_device

    use_no_device(flags.compile)
    with exit_on_input_error():
        meshes = [sizes(text) for text in flags.meshes]
        jax.config.update("jax_num_cpu_devices", max(math.prod(mesh) for mesh in meshes))
        rows = [predict(config, mesh, flags) for mesh in meshes]
    if flags.json:
        print(json.dumps({"config": config.name, "rows": rows}))
        return 0
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(shown(row[name]) for name in names) + " |")
    return 0


def sizes(text: str) -> tuple[int, ...]:
    from inl_jax.config import InputError

    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"--meshes {text}: give data x fsdp x tensor, such as 8x8x1")
    return tuple(map(int, parts))


def predict(config, mesh: tuple[int, ...], flags) -> dict:
    """One row: what an update computes and sends, and how long that takes at least and at most."""
    import jax

    from inl_jax.parallel.sharding import make_mesh
    from inl_jax.planning.collectives import find_collectives, least_bytes
    from inl_jax.planning.xla import compile_abstractly
    from inl_jax.training.state import make_layout

    data, fsdp, tensor = mesh
    micro = data * fsdp * flags.sequences_per_device
    batch = micro * max(1, round(config.batch_size / micro))
    config = dataclasses.replace(
        config,
        mesh=MeshConfig(data=data, fsdp=fsdp, tensor=tensor),
        batch_size=batch,
        accumulate_steps=batch // micro,
        model=dataclasses.replace(config.model, compute_dtype="bfloat16"),
    )
    devices = jax.devices("cpu")[: math.prod(mesh)]
    mesh_ = make_mesh(config.mesh, devices=devices)
    program = compile_abstractly(config, mesh_, make_layout(config, mesh_), flags.compile)
    sent = find_collectives(program.text, mesh_)
    seconds = sum(c.sent_bytes / bandwidth(c.axes, dict(mesh_.shape)) for c in sent)
    seconds += LATENCY * sum(c.times for c in sent)
    tokens = batch * config.data.seq_len
    compute = tokens / len(devices) / flags.tokens_per_second
    total = sum(c.sent_bytes for c in sent)
    return {
        "GPUs": len(devices),
        "mesh": "x".join(map(str, mesh)),
        "tokens per update": tokens,
        "sent, GB": total / 1e9,
        "over the least": total / (least_bytes(config, mesh_) or math.inf),
        "computing, s": compute,
        "exchanging, s": seconds,
        "update, s": [max(compute, seconds), compute + seconds],
        "of linear": [compute / (compute + seconds), compute / max(compute, seconds)],
    }


def bandwidth(axes: tuple[str, ...], shape: dict[str, int]) -> float:
    """Bytes/s with which a device's ring goes along these mesh axes, the last of which is nearest.

    Within a node that is NVLink's. Across nodes every GPU of the ring's in one node has an adapter
    of its own, and each carries an equal part.
    """
    strides, stride = {}, 1
    for axis in reversed(shape):
        strides[axis], stride = stride, stride * shape[axis]
    reach = max(strides[axis] * shape[axis] for axis in axes)
    if reach <= NODE:
        return NVLINK
    in_node = math.prod(
        min(shape[axis], max(1, NODE // strides[axis])) for axis in axes
    )  # GPUs of one ring in one node
    return min(NVLINK, NETWORK * in_node)


def shown(value) -> str:
    if isinstance(value, list):
        return " to ".join(shown(v) for v in value)
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else value


if __name__ == "__main__":
    sys.exit(main())
