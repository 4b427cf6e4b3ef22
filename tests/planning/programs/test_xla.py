import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from inl_jax.config import InputError
from inl_jax.planning.programs import xla

ROOT = Path(__file__).parents[3]
REAL, ALSO_REAL = "--xla_gpu_enable_latency_hiding_scheduler=true", "--xla_cpu_use_onednn=false"


def start(code, home, **env):
    """The JSON that another process prints in its last line."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("JAX_") and k != "XLA_FLAGS"}
    env = clean | {"JAX_PLATFORMS": "cpu", "HOME": str(home), "PYTHONPATH": str(ROOT)} | env
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


COMPILE = """
import json, jax
from inl_jax import console
from inl_jax.planning.programs.xla import use_compile_cache
hits, said = [], []
console.tqdm.write = lambda line, **_: said.append(line)
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name.endswith("cache_hits")))
use_compile_cache()
jax.jit(lambda x: x @ x)(jax.numpy.ones((5, 5)))
kept_from = jax.config.jax_persistent_cache_min_compile_time_secs
print(json.dumps([sum(hits), said, kept_from]))
"""
KEEP_ALL = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def test_compile_cache_gives_a_second_process_what_the_first_compiled(tmp_path):
    cache = tmp_path / ".cache" / "inl_jax" / "xla"
    hits, said, kept_from = start(COMPILE, tmp_path, **KEEP_ALL)
    assert kept_from == 0  # as the user says
    files = set(cache.glob("*-cache"))
    assert hits == 0 and files and said == [f"compiled programs are kept in {cache}"]
    hits, *_ = start(COMPILE, tmp_path, **KEEP_ALL)
    assert hits == len(files) and set(cache.glob("*-cache")) == files


def test_compile_cache_is_where_the_user_put_it(tmp_path):
    own = tmp_path / "own"
    _, said, _ = start(COMPILE, tmp_path, **KEEP_ALL, JAX_COMPILATION_CACHE_DIR=str(own))
    assert said == [f"compiled programs are kept in {own}"] and any(own.iterdir())
    assert not (tmp_path / ".cache").exists()


def test_compile_cache_can_be_turned_off(tmp_path):
    _, said, kept_from = start(COMPILE, tmp_path, JAX_ENABLE_COMPILATION_CACHE="0")
    assert kept_from == xla.KEPT_FROM < 1  # JAX's own would leave out small programs
    assert said == ["compiled programs are not kept: JAX's compilation cache is turned off"]
    assert not list(tmp_path.rglob("*-cache"))


def test_compile_cache_does_without_a_home_to_write_to(tmp_path):
    (tmp_path / ".cache").write_text("a file where the directory should be")
    hits, (said,), _ = start(COMPILE, tmp_path, **KEEP_ALL)
    assert hits == 0 and said.startswith("compiled programs are not kept: ")


def test_library_alone_sets_no_compile_cache(tmp_path):
    code = "import json, jax, inl_jax; print(json.dumps(jax.config.jax_compilation_cache_dir))"
    assert start(code, tmp_path) is None


APPLY = """
import json, os, sys, jax
from inl_jax import console
from inl_jax.planning.programs.xla import apply_flags
said = []
console.tqdm.write = lambda line, **_: said.append(line)
apply_flags({flags!r})
print(json.dumps([os.environ.get("XLA_FLAGS"), said, len(jax.devices())]))
"""


def test_apply_flags_adds_known_flags_and_says_which_it_drops(tmp_path):
    own = "--xla_force_host_platform_device_count=2"
    flags = (REAL, f"--xla_made_up=3 {ALSO_REAL}")
    applied, said, devices = start(APPLY.format(flags=flags), tmp_path, XLA_FLAGS=own)
    assert applied == f"{own} {REAL} {ALSO_REAL}" and devices == 2
    warning, line = said
    assert warning.startswith("WARNING: ") and "--xla_made_up=3" in warning
    assert line == f"XLA_FLAGS={applied}"


def test_apply_flags_without_flags_tries_and_sets_nothing(monkeypatch, said):
    monkeypatch.setattr(xla.subprocess, "run", lambda *_, **__: pytest.fail("tried"))
    before = os.environ.get("XLA_FLAGS")
    xla.apply_flags(())
    assert not said and os.environ.get("XLA_FLAGS") == before


def test_apply_flags_names_flags_of_the_user_that_jax_does_not_take(monkeypatch):
    monkeypatch.setattr(xla, "backends_are_initialized", lambda: False)
    monkeypatch.setenv("XLA_FLAGS", "--xla_made_up=3")
    with pytest.raises(InputError, match="XLA_FLAGS=--xla_made_up=3: JAX does not start with it"):
        xla.apply_flags((REAL,))


def test_apply_flags_refuses_once_jax_has_started():
    jax.devices()
    with pytest.raises(InputError, match="xla_flags=--xla_gpu.*JAX has started already"):
        xla.apply_flags((REAL,))
