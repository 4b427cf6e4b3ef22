"""Reads the reports of ptxas, NVIDIA's assembler, on the kernels of Mosaic GPU."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Usage(NamedTuple):
    """What a kernel takes of a multiprocessor."""

    kernel: str
    registers: int  # of a thread
    spilled_bytes: int  # of a thread, to memory and back: registers that it lacks


def read_report(text: str) -> Usage:
    """Reads what ptxas says about one kernel with its option --verbose."""
    kernel = re.search(r"Compiling entry function '(\w+)'", text)[1]
    stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text).groups()
    registers = re.search(r"Used (\d+) registers", text)[1]
    return Usage(kernel, int(registers), int(stores) + int(loads))


@contextlib.contextmanager
def reports() -> Iterator[list[Usage]]:
    """A list that holds, after the block, the reports on the kernels of Mosaic compiled in it."""
    found: list[Usage] = []
    with tempfile.TemporaryDirectory() as directory:
        os.environ |= {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_TO": directory}
        try:
            yield found
        finally:
            del os.environ["MOSAIC_GPU_DUMP_PTXAS"], os.environ["MOSAIC_GPU_DUMP_TO"]
        found += [read_report(path.read_text()) for path in sorted(Path(directory).glob("*.ptxas"))]
