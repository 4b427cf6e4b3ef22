"""What disks and people do to files: random damages, each of which can be undone."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Damage(NamedTuple):
    """What was done to a folder, and how to undo it."""

    what: str
    undo: Callable[[], object]


def damage(folder: Path, rng: random.Random) -> Damage:
    """Damages one file of a folder, or two: its names or bytes are then others than before."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    while True:
        kind, file = rng.choice(KINDS), rng.choice(files)
        other = rng.choice(files)
        before = {path: path.read_bytes() for path in (file, other)}

        def undo(before=before):
            for path, content in before.items():
                if path.is_dir():
                    shutil.rmtree(path)
                path.write_bytes(content)

        added = kind(file, other, rng)
        if added is not None:
            return Damage(f"{kind.__name__} {added.relative_to(folder)}", added.unlink)
        if any(not p.is_file() or p.read_bytes() != content for p, content in before.items()):
            return Damage(f"{kind.__name__} {file.relative_to(folder)}", undo)


def flip_bit(file, other, rng):
    content = bytearray(file.read_bytes())
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)


def truncate(file, other, rng):
    os.truncate(file, rng.randrange(file.stat().st_size + 1))


def append(file, other, rng):
    with open(file, "ab") as opened:
        opened.write(rng.randbytes(rng.randrange(1, 64)))


def delete(file, other, rng):
    file.unlink()


def zero_block(file, other, rng):
    _overwrite(file, rng, bytes)


def scramble_block(file, other, rng):
    _overwrite(file, rng, rng.randbytes)


def swap(file, other, rng):
    contents = file.read_bytes(), other.read_bytes()
    other.write_bytes(contents[0])
    file.write_bytes(contents[1])


def copy_over(file, other, rng):
    file.write_bytes(other.read_bytes())


def make_directory(file, other, rng):
    file.unlink()
    file.mkdir()


def add_file(file, other, rng):
    added = file.with_name(f"{file.name}.{rng.randrange(10**6)}")
    added.write_bytes(other.read_bytes())
    return added


def _overwrite(file, rng, make):
    content = bytearray(file.read_bytes())
    if content:
        start = rng.randrange(len(content))
        end = min(len(content), start + rng.choice((1, 16, 512, 4096)))
        content[start:end] = make(end - start)
        file.write_bytes(content)


KINDS = (
    flip_bit,
    truncate,
    append,
    delete,
    zero_block,
    scramble_block,
    swap,
    copy_over,
    make_directory,
    add_file,
)
