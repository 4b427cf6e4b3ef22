import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from inl_jax.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def inl(capsys):
    """Runs `inl` with a command line in this process; returns (exit code, stdout, stderr)."""

    def run(*argv):
        capsys.readouterr()
        try:
            code = main.run([str(word) for word in argv])
        except SystemExit as stop:  # --help
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


def start(command, **settings):
    """A process with this project first on its path, on the CPU."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        list(map(str, command)),
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **settings,
    )


def run(*command, **settings):
    """Runs a process; returns (exit code, stdout, stderr, seconds of CPU time)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = start(command, **settings)
    out, err = process.communicate(timeout=300)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return process.returncode, out, err, cpu


def run_inl(*argv, **settings):
    return run(sys.executable, "-m", "inl_jax", *argv, **settings)


TINY_RUN = """
from inl_jax.config import DataConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig
config = TrainConfig(
    model=ModelConfig(vocab_size=300, d_model=16, num_layers=2, num_iterations=3, d_ff=32,
                      max_seq_len=32, controller_width=8, num_heads=2, num_kv_heads=1,
                      remat="none"),
    data=DataConfig(paths=({text!r},), tokenizer="bytes", seq_len=32, validation_fraction=0.1,
                    cache_dir={cache!r}),
    optim=OptimConfig(learning_rate=1e-2, warmup_steps=2),
    mesh=MeshConfig(data=1),
    run_dir={run_dir!r},
    num_steps=4, batch_size=8, log_every=1, eval_every=4, eval_sequences=16, save_every=4,
)
"""


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A config file and the run directory that `inl train` made of it."""
    folder = tmp_path_factory.mktemp("trained")
    words = "the quick brown fox jumps over the lazy dog while seven wizards brew potions".split()
    lines = [" ".join(words[(i * j) % len(words)] for j in range(1, 12)) for i in range(700)]
    (folder / "text.txt").write_text("\n".join(lines))
    config = folder / "config.py"
    config.write_text(
        TINY_RUN.format(
            text=str(folder / "text.txt"), cache=str(folder / "cache"), run_dir=str(folder / "run")
        )
    )
    assert main.run(["train", "--config", str(config)]) == 0
    return config, folder / "run"


def last_json(out):
    return json.loads(out.splitlines()[-1])
