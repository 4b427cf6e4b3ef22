"""The task `stdlib_choice`: which of four docstrings belongs to a function of the standard library.

The questions are made from the installed Python, so numbers compare on one version of Python alone.
A model that was trained on this text has seen the answers.
"""

import ast
import functools
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHOICES = 4
_LENGTHS = range(24, 80)  # characters of a docstring's first line


def questions(**others: Any) -> dict[str, Any]:
    """The task's data, for lm_eval, which passes on `--model_args` and `--metadata`."""
    import datasets

    return {"test": datasets.Dataset.from_list(make_questions())}


@functools.cache
def make_questions() -> list[dict[str, Any]]:
    """`question`, `choices` and the index `answer`; the other choices are of the same module."""
    made = []
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.glob("*.py")):
        found = dict(_functions(ast.parse(path.read_text(encoding="utf-8"))))
        draw = random.Random(path.name)
        for head, line in found.items():
            others = sorted(set(found.values()) - {line})
            if len(others) >= CHOICES - 1:
                choices = [line, *draw.sample(others, CHOICES - 1)]
                draw.shuffle(choices)
                made.append(
                    {
                        "question": f'{head}\n    """',
                        "choices": choices,
                        "answer": choices.index(line),
                    }
                )
    return made


def _functions(module: ast.Module) -> Iterator[tuple[str, str]]:
    """The head of each documented function, and the first line of its docstring."""
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
            line = text.partition("\n")[0]
            if len(line) in _LENGTHS:
                yield f"def {node.name}({ast.unparse(node.args)}):", line
