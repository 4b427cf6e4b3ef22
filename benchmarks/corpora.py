"""Text that any machine with the project has: the corpora of `benchmarks/learning.py`.

code   the standard library of the running Python
prose  English: pydoc's topics, and the docstrings of the packages that the project depends on,
       without their examples
mixed  both
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from inl_jax.files import write_text

CORPORA = ("code", "prose", "mixed")
PACKAGES = ("jax", "numpy", "scipy", "flax", "optax", "orbax-checkpoint", "grain")
_MODULES = {"orbax-checkpoint": "orbax"}
_SHORTEST = 200  # letters of a docstring: shorter ones are a line that repeats the name
_EXAMPLE = re.compile(r"^\s*(>>>|\.\.\. |\.\. |[-=~^*]{4,}|\S+\s*[|+])")


def corpus_paths(name: str, folder: str | Path) -> tuple[str, ...]:
    """The `data.paths` of a corpus; its files are written below `folder` if they are not there."""
    prose = Path(folder) / "prose.txt"
    if name != "code" and not prose.exists():
        prose.parent.mkdir(parents=True, exist_ok=True)
        write_text(prose, "\n\n".join(_prose()))
    return {"code": ("stdlib",), "prose": (str(prose),), "mixed": ("stdlib", str(prose))}[name]


def sources() -> str:
    """The versions that decide the text, for a table's caption."""
    found = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return ", ".join(found)


def _prose() -> list[str]:
    """The texts, without repetitions, in an order that does not depend on the machine."""
    texts = {hashlib.sha256(text.encode()).digest(): text for text in _texts()}
    return [texts[digest] for digest in sorted(texts)]


def _texts() -> Iterator[str]:
    yield from (_plain(text) for text in topics.values())
    for package in PACKAGES:
        spec = importlib.util.find_spec(_MODULES.get(package, package))
        for folder in spec.submodule_search_locations:
            for path in sorted(Path(folder).rglob("*.py")):
                yield from filter(lambda text: len(text) >= _SHORTEST, map(_plain, _docs(path)))


def _docs(path: Path) -> Iterator[str]:
    """The docstrings of a file."""
    try:
        tree = ast.parse(path.read_text(errors="replace"))
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield ast.get_docstring(node) or ""


def _plain(text: str) -> str:
    """A docstring without examples, directives, rules and tables."""
    lines = [line.rstrip() for line in text.splitlines() if not _EXAMPLE.match(line)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
