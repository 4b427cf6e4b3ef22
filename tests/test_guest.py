import logging
import random
import subprocess
import sys

import pytest

from inl_jax.guest import own_logging, own_random


def test_own_logging_leaves_the_root_logger_to_the_program(monkeypatch):
    monkeypatch.setattr(logging.root, "handlers", [])
    with own_logging():
        logging.basicConfig()
    assert logging.root.handlers == []
    mine = logging.NullHandler()
    logging.root.addHandler(mine)
    with own_logging():
        logging.root.addHandler(logging.NullHandler())
    assert logging.root.handlers == [mine]


def test_own_random_puts_back_the_state():
    state = random.getstate()
    with own_random():
        random.random()
    assert random.getstate() == state


SURROUNDINGS = """
import decimal, gc, importlib, locale, logging, os, random, signal, sys, threading, warnings
import jax
import numpy as np

def surroundings():
    os.umask(mask := os.umask(0))
    return {
        "logging": (list(logging.root.handlers), logging.root.level, logging.root.manager.disable),
        "warnings": (warnings.filters[:], warnings.showwarning),
        "hooks": (sys.excepthook, sys.unraisablehook, sys.displayhook, threading.excepthook),
        "signals": {s: signal.getsignal(s) for s in signal.valid_signals()},
        "random": (random.getstate(), str(np.random.get_state())),
        "process": (os.getcwd(), dict(os.environ), mask, locale.setlocale(locale.LC_ALL)),
        "python": (sys.argv[:], sys.path[:], sys.stdin, sys.stdout, sys.stderr),
        "limits": (sys.getrecursionlimit(), gc.get_threshold(), gc.isenabled()),
        "numbers": (str(decimal.getcontext()), np.geterr(), np.get_printoptions()),
        "threads": [t for t in threading.enumerate() if not t.daemon],
        "jax": dict(jax.config.values),
    }

before = surroundings()
import inl_jax
from inl_jax.console import _muted
for name in inl_jax.__all__:
    getattr(inl_jax, name)
config = inl_jax.load_config(sys.argv[1])
inl_jax.train(config)
inl_jax.LanguageModel.from_run(config.run_dir).generate("the", max_new_tokens=2)
after = surroundings()
assert importlib.import_module("inl_jax.console")._muted == _muted
changed = [name for name in before if before[name] != after[name]]
assert not changed, [(name, before[name], after[name]) for name in changed]
logging.basicConfig(level=logging.INFO, format="MINE %(message)s")
logging.info("hello")
"""


@pytest.mark.slow
def test_import_and_train_change_nothing_around_the_library(tiny_run):
    command = [sys.executable, "-c", SURROUNDINGS, tiny_run[0]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "MINE hello" in done.stderr, done.stderr
