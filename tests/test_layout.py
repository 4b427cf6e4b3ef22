"""The rooms of the library, the order of their imports, and their sizes."""

import ast
import functools
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "inl_jax"

# Imports run down this list and never up.
FLOORS = [
    {"__main__", "cli", "questions"},
    {"terminal"},
    {
        "trainer",
        "result",
        "evaluation",
        "sampling",
        "guide",
        "checklist",
        "initial_weights",
        "start",
        "watch",
        "report",
        "harness",
    },
    {"interop"},
    {"planning"},
    {"storage", "training", "tracking", "curriculum"},
    {"parallel"},
    {"data", "model"},
    {"tokens"},
    {"text"},
    {
        "checks",
        "config",
        "config_file",
        "config_help",
        "console",
        "data_config",
        "environment",
        "failures",
        "files",
        "guest",
        "internals",
        "limits",
        "model_config",
        "orbax",
        "other_names",
        "phase",
        "redact",
    },
]
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py" and "configs" not in path.parts
}


def room_of(module: str) -> str:
    return module.split(".")[1]


@functools.cache
def imports(path: Path) -> set[str]:
    """The modules of the library that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # The files of an exported model import each other as transformers wants it.
            assert node.level == 0 or path.parent.name == "exported", f"{path}: a relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & MODULES.keys()


def test_every_file_is_in_a_room_of_the_list():
    assert {room_of(module) for module in MODULES} == FLOOR.keys()


def test_imports_run_down_the_list_and_never_up():
    up = [
        f"{module} -> {other}"
        for module, path in MODULES.items()
        for other in imports(path)
        if FLOOR[room_of(other)] < FLOOR[room_of(module)]
        or {room_of(module), room_of(other)} == {"data", "model"}
    ]
    assert not up


def test_imports_make_no_circle():
    graph = {module: imports(path) - {module} for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module, above):
        assert module not in above, " -> ".join([*above, module])
        if module not in done:
            for other in graph[module]:
                visit(other, [*above, module])
            done.add(module)

    for module in graph:
        visit(module, [])


def test_files_and_folders_stay_small():
    lines, files = defaultdict(int), defaultdict(int)
    for path in MODULES.values():
        length = len(path.read_text().splitlines())
        assert length <= 425, (
            f"{path.relative_to(ROOT)} has {length} lines: is there a second noun?"
        )
        lines[path.parent] += length
        files[path.parent] += 1
    for folder, length in lines.items():
        if folder != PACKAGE:
            assert length <= 1500 and files[folder] > 1, (folder.name, length, files[folder])


def test_tests_mirror_the_folders():
    of_the_whole = {"test_advice.py", "test_layout.py", "test_package.py", "test_source.py"}
    stray = [
        path.relative_to(ROOT)
        for room in {path.parent for path in MODULES.values()}
        for path in (ROOT / "tests" / room.relative_to(PACKAGE)).glob("test_*.py")
        if not (room / path.name.removeprefix("test_")).exists() and path.name not in of_the_whole
    ]
    assert not stray


@pytest.mark.parametrize(
    "pattern, homes",
    [
        (
            r"jax\._src|jax\.experimental(?!\.pallas| import pallas)"
            r"|jaxlib\.|(?:import|from) jaxlib|\._manager\b",
            ["internals"],
        ),
        (r"jax\.experimental(?:\.| import )pallas", ["mosaic"]),
        (r"fmt: skip", []),
        (r"\bprint\(", []),
        (r"from orbax|import orbax\.", ["orbax", "internals"]),
    ],
    ids=[
        "private names of JAX and Orbax",
        "kernels for GPUs",
        "layout of the formatter",
        "say and show, the channels",
        "Orbax, imported as a guest",
    ],
)
def test_what_has_one_home_stands_nowhere_else(pattern, homes):
    for module, path in MODULES.items():
        if not set(module.split(".")) & set(homes):
            found = re.search(pattern, path.read_text())
            assert not found, f"{module}: {found[0]}"
