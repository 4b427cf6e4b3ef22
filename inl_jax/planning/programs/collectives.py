"""The data that devices send each other in a compiled step, read from the step's text.

XLA writes every collective into the program, and the body of a loop once with its trip count. So
the bytes of a whole update are counted without running it. They are those of ring algorithms, which
send the least (Patarasuk and Yuan, 2009): each of `n` devices sends `(n - 1) / n` of the whole
array in an all-gather, a reduce-scatter or an all-to-all, and twice that in an all-reduce.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from inl_jax.config import TrainConfig
from inl_jax.model.language_model import abstract_params
from inl_jax.parallel.sharding import param_shardings

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {
    "pred": 8,
    "bf16": 16,
    "f16": 16,
    "f32": 32,
    "f64": 64,
    "s8": 8,
    "u8": 8,
    "s16": 16,
    "u16": 16,
    "s32": 32,
    "u32": 32,
    "s64": 64,
    "u64": 64,
}


class Collective(NamedTuple):
    """One collective of a program."""

    kind: str
    axes: tuple[str, ...]  # of the mesh, along which devices exchange
    arrays: tuple[tuple[int, ...], ...]  # shapes of its outputs for all-gather, else of its inputs
    times: int  # that one run of the program executes it
    sent_bytes: int  # by each device, over all these times
    origin: str  # in the model, as JAX names it


def find_collectives(program: str, mesh: Mesh) -> list[Collective]:
    """The collectives of a compiled program.

    Args:
      program: the optimised HLO, from `compiled.as_text()`.
      mesh: that it was compiled for.
    """
    computations, entry = _computations(program)
    found = []
    for name, times in _times_called(computations, entry).items():
        types = {}
        for line in computations[name]:
            if match := _INSTRUCTION.match(line):
                types[match["name"]] = match["type"]
        for line in computations[name]:
            match = _INSTRUCTION.match(line)
            kind = match and match["op"].removesuffix("-start")
            if kind in KINDS:
                found.append(_collective(kind, line, match, types, times, mesh))
    return [c for c in found if c.sent_bytes > 0]


def summed(collectives: Iterable[Collective]) -> dict[tuple[str, str], tuple[int, int]]:
    """Sums of (times, sent bytes) by (kind, mesh axes joined by "+"), the most bytes first."""
    sums = defaultdict(lambda: (0, 0))
    for c in collectives:
        times, sent = sums[key := (c.kind, "+".join(c.axes))]
        sums[key] = times + c.times, sent + c.sent_bytes
    return dict(sorted(sums.items(), key=lambda item: -item[1][1]))


def least_bytes(config: TrainConfig, mesh: Mesh) -> int:
    """Bytes that each device must at least send in one update, beside those over `tensor`.

    In every micro-batch, parameters sharded over `fsdp` are all-gathered and their gradients
    reduce-scattered, in the type of the parameters, and gradients are all-reduced over `data`. A
    block that is recomputed in the backward pass gathers its parameters once more; that is not
    counted here.

    Args:
      config: the run, fitted to `mesh`.
      mesh: from `make_mesh`.
    """
    shardings = param_shardings(mesh, config.model)
    data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
    sent = 0
    for leaf, sharding in zip(
        *map(jax.tree.leaves, (abstract_params(config.model), shardings)), strict=True
    ):
        part = math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        # Leaves sharded over fsdp are gathered, scattered, then summed over data. Whole leaves are
        # summed over both axes.
        split = "fsdp" in jax.tree.leaves(tuple(sharding.spec))
        sent += part * (2 * (fsdp - 1) if split else 0)
        over = data if split else data * fsdp
        sent += 2 * part * (over - 1) / over
    return int(sent * config.accumulate_steps)


# --- the text of a program

_INSTRUCTION = re.compile(
    r"\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>\(.*?\)|\S+) (?P<op>[\w-]+)\("
    r"(?P<operands>[^)]*)\)"
)
_CALLED = re.compile(
    r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.-]+)"
    r"|(?:branch_computations|called_computations)=\{([^}]*)\}"
)
_TYPE = re.compile(r"(\w+)\[([\d,]*)\]")


def _computations(program: str) -> tuple[dict[str, list[str]], str]:
    """Lines of each computation by its name, and the name of the entry computation."""
    found, entry, lines = {}, "", []
    for line in program.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            lines = found[match[2]] = []
            entry = match[2] if match[1] else entry
        else:
            lines.append(line)
    return found, entry


def _times_called(computations: dict[str, list[str]], entry: str) -> dict[str, int]:
    """How often one run of the program executes each computation."""
    calls = {name: list(_calls(lines)) for name, lines in computations.items()}
    times = defaultdict(int)

    def visit(name: str, n: int) -> None:
        times[name] += n
        for called, each in calls[name]:
            if called in computations:
                visit(called, n * each)

    visit(entry, 1)
    return times


def _calls(lines: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Yields (called computation, times that the call runs it)."""
    for line in lines:
        if "=%" not in line and "={%" not in line and "calls=" not in line and "body=" not in line:
            continue
        trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
        for match in _CALLED.finditer(line):
            names = [match[1]] if match[1] else re.findall(r"[\w.-]+", match[2])
            for name in names:
                yield name, int(trips[1]) if trips else 1


def _collective(kind, line, match, types, times, mesh) -> Collective:
    operands = re.findall(r"%([\w.-]+)", match["operands"])
    arrays = [array for name in operands for array in _TYPE.findall(types[name])]
    shapes = [tuple(int(n) for n in dims.split(",") if n) for _, dims in arrays]
    size = sum(math.prod(s) * _BITS[t] // 8 for (t, _), s in zip(arrays, shapes, strict=True))
    axes, n = _group(line, mesh)
    sent = {
        "all-gather": (n - 1) * size,
        "all-reduce": 2 * (n - 1) * size // n,
        "collective-permute": size,
    }.get(kind, (n - 1) * size // n)
    if kind == "all-gather":
        at = int(re.search(r"dimensions=\{(\d+)\}", line)[1])
        shapes = [(*s[:at], n * s[at], *s[at + 1 :]) for s in shapes]
    origin = re.search(r'op_name="([^"]*)"', line)
    return Collective(
        kind, axes, tuple(shapes), times, sent * times if n > 1 else 0, origin[1] if origin else ""
    )


def _group(line: str, mesh: Mesh) -> tuple[tuple[str, ...], int]:
    """The mesh axes along which the devices of a group differ, and the size of the group."""
    devices = _first_group(line, mesh.size)
    places = np.unravel_index(devices, tuple(mesh.shape.values()))
    axes = tuple(a for a, at in zip(mesh.axis_names, places, strict=True) if len(set(at)) > 1)
    return axes, len(devices)


def _first_group(line: str, num_devices: int) -> list[int]:
    """Devices of the first group that exchange data. XLA writes groups in one of four ways."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        moved = [p for p in re.findall(r"(\d+),(\d+)", pairs[1]) if p[0] != p[1]]
        return [int(n) for n in moved[0]] if moved else [0]
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return [int(n) for n in listed[1].split(",")]
    if named := re.search(
        r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", line
    ):
        sizes = {axis: int(n) for axis, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
        ids = _iota(named[2]) if named[2] else np.arange(num_devices)
        along = re.findall(r"'(\w+)'", named[3])
        ids = ids.reshape(list(sizes.values()))
        return ids[tuple(slice(None) if a in along else 0 for a in sizes)].ravel().tolist()
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line):
        ids = _iota(iota[3])
        return ids.reshape(int(iota[1]), int(iota[2]))[0].tolist()
    return list(range(num_devices))  # without groups all devices exchange


def _iota(text: str) -> np.ndarray:
    """Reads `[4,2]T(1,0)`: 0..7 in shape (4, 2), axes transposed to (1, 0), then flattened."""
    dims, order = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    shape = [int(n) for n in dims.split(",")]
    order = [int(n) for n in order.split(",")] if order else range(len(shape))
    return np.arange(math.prod(shape)).reshape(shape).transpose(order).ravel()
