"""`scripts/skypilot_3b.yaml`, with stubs of its commands and on the CPU of one machine."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from inl_jax.config_file import load_config
from inl_jax.failures import EXIT_INTERRUPTED

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
TASK = yaml.safe_load((ROOT / "scripts" / "skypilot_3b.yaml").read_text())
NODE = {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "127.0.0.1"}


@pytest.fixture
def machine(tmp_path):
    """Starts a script of the task; its home and its bucket lie in `tmp_path`."""

    def start(script, **variables):
        env = TASK["envs"] | NODE | {"SKYPILOT_NUM_GPUS_PER_NODE": "8", "DATA": "hf:a/b"}
        env |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)} | variables
        script = TASK[script].replace("/bucket", f"{tmp_path}/bucket")
        return subprocess.Popen(
            ["bash", "-c", script],
            cwd=ROOT,
            env={name: str(value) for name, value in env.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


@pytest.fixture
def make_command(tmp_path):
    """Makes a command that does a line of shell; first on the PATH, or at a place in the home."""

    def make(name, line):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)

    return make


def test_setup_asks_for_extras_and_a_python_of_this_project(machine, make_command, tmp_path):
    for name in ("pip", "uv"):
        make_command(name, f'echo {name} "$@"')
    out, _ = machine("setup").communicate()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    _, venv, install = out.splitlines()
    assert f"{tmp_path}/inl" in venv and f"--python {tmp_path}/inl/bin/python" in install
    (version,) = re.findall(r"--python (3\.\d+) ", venv)
    assert f"Programming Language :: Python :: {version}" in project["classifiers"]
    (extras,) = re.findall(r"\.\[(.*)\]", install)
    assert set(extras.split(",")) < project["optional-dependencies"].keys()


def test_run_asks_for_flags_of_train_and_ends_with_its_code(machine, make_command, tmp_path):
    make_command("inl/bin/inl", f"printf '%s\\n' \"$@\"; exit {EXIT_INTERRUPTED}")
    process = machine("run", FLAGS="--num_steps 9000 --patience 5")
    verb, _, name, *flags = process.communicate()[0].splitlines()
    assert process.returncode == EXIT_INTERRUPTED
    assert EXIT_INTERRUPTED in TASK["resources"]["job_recovery"]["recover_on_exit_codes"]
    config = load_config(name, flags)
    assert (verb, name, config.mesh.fsdp, config.num_steps) == ("train", "3b", 8, 9000)
    kept = (config.run_dir, config.data.cache_dir)
    assert all(path.startswith(f"{tmp_path}/bucket/") for path in kept)


@pytest.mark.slow
def test_lost_machines_are_replaced_and_their_run_resumes(
    machine, make_command, text_file, tmp_path
):
    """Two nodes on loopback, lost after a save, then one."""
    make_command("inl/bin/inl", f'exec {sys.executable} -m inl_jax "$@"')
    flags = "--batch_size 2 --data.seq_len 32 --data.tokenizer bytes --eval_sequences 2 "
    flags += "--model.d_model 16 --model.num_layers 1 --model.num_iterations 1 --model.d_ff 32"
    variables = {
        "CONFIG": "tiny",
        "DATA": text_file,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": ROOT,
        "SKYPILOT_NUM_GPUS_PER_NODE": 1,
    }

    def run(steps, rank=0, **nodes):
        more = f"{flags} --num_steps {steps} --save_every 2 --eval_every {steps}"
        nodes = {"SKYPILOT_NODE_RANK": rank} | nodes
        return machine("run", FLAGS=f"{more} --optim.warmup_steps 1", **variables | nodes)

    two = {"SKYPILOT_NUM_NODES": 2, "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1"}
    processes = [run(4, rank, **two) for rank in range(2)]
    outs = [process.communicate(timeout=900)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outs
    assert "found 2 x cpu" in outs[0]
    (tmp_path / "bucket/runs/tiny/checkpoints/4/manifest.json").write_text("uploaded in part")
    process = run(6)
    out, _ = process.communicate(timeout=900)
    assert process.returncode == 0 and "resuming" in out and "update 2" in out, out
