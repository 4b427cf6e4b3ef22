"""Reads the text of a program that XLA compiled for a GPU: its kernels, their bytes and their FLOP.

An instruction outside of fusions is a kernel. A kernel reads once what it needs of its operands and
writes its outputs once; a product that reads an operand again counts it once. Only kernels of
Mosaic say what they read again, from the L2 cache. What an update in place leaves alone is neither
read nor written. The kernels of a loop count as often as the loop runs. Memory of the host counts
as memory of the GPU.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

ITEM_BYTES = {"pred": 1, "bf16": 2, "token": 0}  # the other types say how many bits they have

# No kernels: names for memory, and what other instructions run.
FREE = {
    "after-all",
    "async-done",
    "bitcast",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
# An element of the output needs at most one element of each operand, even if their sizes differ.
ONE_EACH = {"broadcast", "concatenate", "dynamic-slice", "gather", "pad", "slice"}
# Operations that can update their first operand in place, and which operand is the update.
UPDATE_AT = {"dynamic-update-slice": 1, "scatter": 2}


class Array(NamedTuple):
    """The type of an array."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def item_bytes(self) -> int:
        """Bytes of an element."""
        if self.dtype in ITEM_BYTES:
            return ITEM_BYTES[self.dtype]
        return int(re.search(r"\d+", self.dtype)[0]) // 8

    @property
    def num_bytes(self) -> int:
        """Bytes."""
        return self.size * self.item_bytes


class Instruction(NamedTuple):
    """One line of a program."""

    name: str
    outputs: tuple[Array, ...]  # one, or the leaves of a tuple
    opcode: str
    operands: tuple[str, ...]  # names of instructions; of a parameter its number
    attributes: dict[str, str]

    @property
    def size(self) -> int:
        """Elements of all outputs."""
        return sum(array.size for array in self.outputs)

    @property
    def num_bytes(self) -> int:
        """Bytes of all outputs."""
        return sum(array.num_bytes for array in self.outputs)

    @property
    def op_name(self) -> str:
        """Where it comes from in the model, as JAX names it; "" if XLA does not say."""
        for part in _split(self.attributes.get("metadata", "{}")[1:-1], " "):
            key, _, value = part.partition("=")
            if key == "op_name":
                return value.strip('"')
        return ""

    def calls(self, *attributes: str) -> str:
        """The computation that one of these attributes names."""
        return next(self.attributes[a] for a in attributes if a in self.attributes).lstrip("%")

    @property
    def config(self) -> dict[str, Any]:
        """What the compiler's backend decided."""
        return json.loads(self.attributes.get("backend_config", "{}"))


class Computation(NamedTuple):
    """Instructions by name, operands before their users."""

    instructions: dict[str, Instruction]
    root: Instruction

    def leaves(self) -> list[Instruction]:
        """The instructions that make the outputs."""
        if self.root.opcode == "tuple":
            return [self.instructions[name] for name in self.root.operands]
        return [self.root]


class Program(NamedTuple):
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str


class Loop(NamedTuple):
    """A loop around a kernel."""

    name: str
    trips: int


class Kernel(NamedTuple):
    """What one instruction runs on the GPU."""

    name: str
    kind: str  # of an instruction its opcode, of a fusion its emitter, of a custom call its target
    op_name: str  # of the instruction; or else of what is fused in it, or of its loop
    loops: tuple[Loop, ...]  # the outermost first
    bytes_read: int
    bytes_written: int
    flops: int  # of matrix products
    bytes_again: int = 0  # read once more, from the L2 cache; known of kernels of Mosaic alone

    @property
    def times(self) -> int:
        """How often one run of the program runs it."""
        return math.prod(loop.trips for loop in self.loops)

    @property
    def num_bytes(self) -> int:
        """Bytes read and written in one run of the kernel."""
        return self.bytes_read + self.bytes_written


# --- the text


def parse(text: str) -> Program:
    """Reads a program from `compiled.as_text()`."""
    computations, entry, name, lines = {}, "", "", {}
    for line in re.sub(r"/\*index=\d+\*/", "", text).split("\n"):
        if line.startswith("  "):
            instruction = _instruction(line.strip().removeprefix("ROOT "))
            lines[instruction.name] = instruction
            if line.startswith("  ROOT "):
                computations[name] = Computation(lines, instruction)
        elif line.endswith("{"):
            name, lines = line.removeprefix("ENTRY ").split()[0].lstrip("%"), {}
            entry = name if line.startswith("ENTRY ") else entry
    return Program(computations, entry)


def _instruction(line: str) -> Instruction:
    """Reads `%name = type opcode(operands), attribute=value, ...`."""
    name, _, rest = line.partition(" = ")
    call, *attributes = _split(rest, ",")
    outputs, call = _split(call, " ")
    opcode, _, operands = call.removesuffix(")").partition("(")
    return Instruction(
        name.lstrip("%"),
        tuple(_arrays(outputs)),
        opcode,
        tuple(operand.split()[-1].lstrip("%") for operand in _split(operands, ",")),
        dict(attribute.split("=", 1) for attribute in attributes),
    )


def _arrays(text: str) -> Iterator[Array]:
    for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", text):
        yield Array(dtype, tuple(_integers(dims)))


def _integers(text: str) -> list[int]:
    return [int(n) for n in text.strip("{}").split(",") if n]


_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[(\[{]|[)\]}]|[, ]')


def _split(text: str, separator: str) -> list[str]:
    """The parts of a text between separators that no bracket or quotation mark encloses."""
    parts, depth, start = [], 0, 0
    for token in _TOKEN.finditer(text):
        if token[0] in "([{":
            depth += 1
        elif token[0] in ")]}":
            depth -= 1
        elif token[0] == separator and depth == 0:
            parts.append(text[start : token.start()])
            start = token.end()
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]


# --- kernels


def kernels(
    program: Program, mosaic_bytes: Callable[[str, Array], tuple[int, int]]
) -> list[Kernel]:
    """The kernels of a program, in its order.

    A loop counts once if XLA does not know how often it runs. An asynchronous operation is one
    kernel: the operands of its start, the outputs of its end.

    Args:
      program: from `parse`.
      mosaic_bytes: bytes that a kernel of Mosaic moves, and that it reads again, by its op_name and
        its first operand. XLA's text shows neither them nor that kernel's FLOP, which count as 0.

    Raises:
      ValueError: the program branches, and the text does not say where to.
    """

    def visit(name: str, loops: tuple[Loop, ...], origin: str) -> Iterator[Kernel]:
        body = program.computations[name].instructions
        for instruction in body.values():
            opcode, inner = instruction.opcode, instruction.op_name or origin
            if opcode == "while":
                trips = int(instruction.config.get("known_trip_count", {"n": 1})["n"])
                inside = (*loops, Loop(instruction.name, trips))
                yield from visit(instruction.calls("body"), inside, inner)
            elif opcode in ("async-start", "call"):
                yield from visit(instruction.calls("calls", "to_apply"), loops, inner)
            elif opcode == "conditional":
                raise ValueError(f"{instruction.name}: the text does not say which branch runs")
            elif opcode not in FREE and not opcode.endswith(("-start", "-update")):
                if opcode.endswith("-done"):
                    instruction = _whole(instruction, body)
                alone = _alone(instruction, body)
                yield _kernel(program, alone, loops, origin, mosaic_bytes)

    return list(visit(program.entry, (), ""))


def _whole(done: Instruction, body: dict[str, Instruction]) -> Instruction:
    """The operation that an asynchronous start and its end stand for."""
    start = body[done.operands[0]]
    while start.opcode.endswith("-update"):
        start = body[start.operands[0]]
    return start._replace(outputs=done.outputs, opcode=start.opcode.removesuffix("-start"))


def _alone(instruction: Instruction, body: dict[str, Instruction]) -> Computation:
    """A computation of one instruction, whose operands are parameters."""
    parameters = {
        name: body[name]._replace(opcode="parameter", operands=(str(i),))
        for i, name in enumerate(instruction.operands)
    }
    return Computation(parameters | {instruction.name: instruction}, instruction)


def _kernel(program, computation, loops, origin, mosaic_bytes) -> Kernel:
    instruction, kind, op_names = computation.root, computation.root.opcode, []
    if kind == "fusion":
        computation = program.computations[instruction.calls("calls")]
        kind = instruction.config.get("fusion_backend_config", {}).get("kind", "").strip("_")
        kind = kind or instruction.attributes["kind"]
        op_names = [i.op_name for i in (computation.root, *computation.instructions.values())]
    op_name = next(filter(None, (instruction.op_name, *op_names, origin)), "")
    read, written = _traffic(program, computation)
    flops, again = _flops(program, computation), 0
    if kind == "custom-call":
        kind = instruction.attributes["custom_call_target"].strip('"')
        if kind.startswith("__cudnn$fmha"):
            flops = _attention_flops(computation)
        elif kind.startswith("mosaic_gpu"):
            operand = computation.instructions[instruction.operands[0]].outputs[0]
            moved, again = mosaic_bytes(op_name, operand)
            read = moved - written
    return Kernel(instruction.name, kind, op_name, loops, read, written, flops, again)


# --- bytes


def _traffic(program: Program, computation: Computation) -> tuple[int, int]:
    """Bytes that a kernel reads of its parameters, and bytes that it writes."""
    written = {leaf.name: _written(leaf, computation) for leaf in computation.leaves()}
    needed = {name: part.size for name, part in written.items()}
    read = sum(
        elements * parameter.outputs[0].item_bytes
        for parameter, elements in _elements_read(program, computation, needed)
    )
    return read, sum(part.num_bytes for part in written.values())


def _written(leaf: Instruction, computation: Computation) -> Instruction:
    """What is written of an output: all of it, or the update if a parameter is updated in place."""

    def behind_bitcasts(instruction: Instruction) -> Instruction:
        while instruction.opcode == "bitcast":
            instruction = computation.instructions[instruction.operands[0]]
        return instruction

    made = behind_bitcasts(leaf)
    if made.opcode in UPDATE_AT:
        base, update = (
            computation.instructions[made.operands[i]] for i in (0, UPDATE_AT[made.opcode])
        )
        if behind_bitcasts(base).opcode == "parameter":
            return update
    return leaf


def _elements_read(
    program: Program, computation: Computation, needed: dict[str, int]
) -> Iterator[tuple[Instruction, int]]:
    """Yields parameters with how many of their elements are needed.

    Args:
      program: for the computations that are fused in this one.
      computation: of one kernel, or one that is fused in it.
      needed: elements of each output that are needed.
    """
    # Elements of each instruction that are needed, by what needs them. Every slice needs its own;
    # several paths of elementwise operations from one slice need the same.
    takes = defaultdict(dict, {name: {name: n} for name, n in needed.items()})
    for instruction in reversed(computation.instructions.values()):  # users before operands
        n = min(sum(takes[instruction.name].values()), instruction.size)
        if instruction.opcode == "parameter":
            yield instruction, n
        elif instruction.opcode == "fusion" and n > 0:
            fused = program.computations[instruction.calls("calls")]
            whole = {leaf.name: leaf.size for leaf in fused.leaves()}
            for parameter, elements in _elements_read(program, fused, whole):
                operand = instruction.operands[int(parameter.operands[0])]
                takes[operand][instruction.name, parameter.name] = elements
        elif instruction.opcode != "constant" and n > 0:
            for name in instruction.operands:
                size = computation.instructions[name].size
                if instruction.opcode == "dynamic-update-slice" and name == instruction.operands[0]:
                    update = computation.instructions[instruction.operands[1]]
                    takes[name][instruction.name] = max(0, n - update.size)
                elif instruction.opcode in ONE_EACH:
                    takes[name][instruction.name] = n
                elif size == instruction.size:
                    takes[name] |= takes[instruction.name]
                else:
                    takes[name][instruction.name] = size


# --- FLOP


def _flops(program: Program, computation: Computation) -> int:
    """FLOP of matrix products; a multiply-add counts as 2."""
    flops = 0
    for instruction in computation.instructions.values():
        if instruction.opcode == "dot":
            left = computation.instructions[instruction.operands[0]].outputs[0]
            contracted = _integers(instruction.attributes["lhs_contracting_dims"])
            flops += 2 * instruction.size * math.prod(left.dims[i] for i in contracted)
        elif instruction.opcode == "fusion":
            flops += _flops(program, program.computations[instruction.calls("calls")])
    return flops


def _attention_flops(computation: Computation) -> int:
    """Of cuDNN's attention: 2 products, 5 in its gradient; a causal mask leaves half of each."""
    call = computation.root
    config = call.config["cudnn_fmha_backend_config"]
    scores = math.prod(map(int, config["intermediate_tensor_shape"]["dimensions"]))
    head_width = computation.instructions[call.operands[0]].outputs[0].dims[-1]
    products = 5 if "Backward" in call.attributes["custom_call_target"] else 2
    return products * 2 * scores * head_width // (2 if config["mask_type"] == "CAUSAL" else 1)
