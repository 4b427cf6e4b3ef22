"""A library is a guest: what our dependencies change in the program around us is put back."""

import contextlib
import logging
import random
from collections.abc import Iterator


@contextlib.contextmanager
def own_logging() -> Iterator[None]:
    """Removes the handlers that the root logger gains in the block; also a decorator.

    absl, which Orbax logs with, calls `logging.basicConfig()` if there is none. A program that
    calls it later, with its own settings, would find that it does nothing.
    """
    before = list(logging.root.handlers)
    try:
        yield
    finally:
        for handler in [h for h in logging.root.handlers if h not in before]:
            logging.root.removeHandler(handler)


@contextlib.contextmanager
def own_random() -> Iterator[None]:
    """Puts back the state of `random`: to import rich, which Flax needs, draws numbers."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)
