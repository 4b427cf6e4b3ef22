"""How long does an update take on 1 to 512 GPUs? A prediction, not a measurement.

python benchmarks/scaling.py --config configs/3b.py [--section.field value ...]
    [--meshes 1x1x1 1x8x1 8x8x1 64x8x1] [--sequences_per_device 1] [--tokens_per_second 10160]
    [--compile cuda] [--json]

It follows from the bytes that devices send in the compiled step and from published bandwidths.
Nothing runs on a GPU.

A mesh is data x fsdp x tensor. A micro-batch has --sequences_per_device sequences on each device.
An update has batch_size sequences, rounded to whole micro-batches, and at least one of these.
--tokens_per_second is what one GPU computes alone; the default is the ceiling of the 3b on an H100
(docs/benchmarks.md).
"""

import argparse
import json
import math
from collections.abc import Sequence
from typing import Any

import jax
from harness import check_positive, make_parser, markdown

from inl_jax.config import InputError, TrainConfig, with_fields
from inl_jax.parallel.sharding import make_mesh
from inl_jax.planning.hardware import GPUS_PER_NODE, find_gpu
from inl_jax.planning.programs.collectives import find_collectives, least_bytes
from inl_jax.planning.programs.xla import compile_abstractly, use_no_device
from inl_jax.terminal.command_line import exit_on_input_error, from_command_line
from inl_jax.training.state import make_layout

H100 = find_gpu("h100")
LATENCY = 20e-6  # seconds until a collective begins to move data; assumed


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("scaling", __doc__)
    parser.add_argument("--meshes", nargs="+", default=["1x1x1", "1x8x1", "8x8x1", "64x8x1"])
    parser.add_argument("--sequences_per_device", type=int, default=1, help="in a micro-batch")
    parser.add_argument("--tokens_per_second", type=float, default=10160, help="of one GPU alone")
    parser.add_argument("--compile", choices=("cpu", "cuda"), default="cuda", help="by which XLA")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    with exit_on_input_error():
        config, flags = from_command_line(parser, argv)
        check_positive(flags)
        meshes = [sizes(text) for text in flags.meshes]
        use_no_device(flags.compile)
        jax.config.update("jax_num_cpu_devices", max(math.prod(mesh) for mesh in meshes))
        rows = [predict(config, mesh, flags) for mesh in meshes]
    if flags.json:
        print(json.dumps({"config": config.name, "rows": rows}))
    else:
        print(markdown([{name: shown(value) for name, value in row.items()} for row in rows]))


def sizes(text: str) -> tuple[int, ...]:
    """The axes of a mesh such as 8x8x1."""
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"--meshes {text}: give data x fsdp x tensor, such as 8x8x1")
    return tuple(map(int, parts))


def predict(
    config: TrainConfig, mesh_sizes: tuple[int, ...], flags: argparse.Namespace
) -> dict[str, Any]:
    """A row: what an update computes and sends, and how long it takes at least and at most."""
    data, fsdp, tensor = mesh_sizes
    micro_batch = data * fsdp * flags.sequences_per_device
    micro_batches = max(1, round(config.batch_size / micro_batch))
    fields = {
        "mesh.data": data,
        "mesh.fsdp": fsdp,
        "mesh.tensor": tensor,
        "batch_size": micro_batch * micro_batches,
        "accumulate_steps": micro_batches,
        "model.compute_dtype": "bfloat16",
    }
    config = with_fields(config, fields)
    mesh = make_mesh(config.mesh, devices=jax.devices("cpu"))
    program = compile_abstractly(config, mesh, make_layout(config, mesh), flags.compile)
    sent = find_collectives(program.text, mesh)
    exchanging = sum(c.sent_bytes / bandwidth(c.axes, dict(mesh.shape)) for c in sent)
    exchanging += LATENCY * sum(c.times for c in sent)
    tokens = config.batch_size * config.data.seq_len
    computing = tokens / mesh.size / flags.tokens_per_second
    total = sum(c.sent_bytes for c in sent)
    return {
        "GPUs": mesh.size,
        "mesh": "x".join(map(str, mesh_sizes)),
        "tokens per update": tokens,
        "sent, GB": total / 1e9,
        "over the least": total / (least_bytes(config, mesh) or math.inf),
        "computing, s": computing,
        "exchanging, s": exchanging,
        "update, s": [max(computing, exchanging), computing + exchanging],
        "of linear": [
            computing / (computing + exchanging),
            computing / max(computing, exchanging),
        ],
    }


def bandwidth(axes: tuple[str, ...], shape: dict[str, int]) -> float:
    """Bytes/s that each device of a ring over these mesh axes sends.

    Within a node the ring runs over NVLink. Across nodes, every GPU of the ring that is in one node
    has an adapter of its own, and each adapter carries an equal part.

    Args:
      axes: the mesh axes that the collective runs over.
      shape: devices along each axis of the mesh; devices next to each other on the last axis are
        in the same node.
    """
    strides, stride = {}, 1
    for axis in reversed(shape):
        strides[axis], stride = stride, stride * shape[axis]
    reach = max(strides[axis] * shape[axis] for axis in axes)
    if reach <= GPUS_PER_NODE:
        return H100.link
    in_node = math.prod(
        min(shape[axis], max(1, GPUS_PER_NODE // strides[axis])) for axis in axes
    )  # GPUs of one ring in one node
    return min(H100.link, H100.network * in_node)


def shown(value: Any) -> str:
    """A number or a range for people, to three digits."""
    if isinstance(value, list):
        return " to ".join(shown(v) for v in value)
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else value


if __name__ == "__main__":
    main()
