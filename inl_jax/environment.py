"""Where a run was started: versions, devices, command and machine, without secrets.

RUN/env.json holds one entry for each start, so that a run resumed on another machine still says
where its first part ran.
"""

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import inl_jax
from inl_jax.console import reason, say
from inl_jax.files import json_text, read_bytes, write_text
from inl_jax.limits import usable_cpus
from inl_jax.redact import redact

_PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "tokenizers",
    "tensorboardX",
    "wandb",
    "trackio",
)
# Of the environment only these variables are recorded. Slurm has others that are secret.
_VARIABLES = re.compile(
    r"(JAX|XLA|NCCL)_\w+|CUDA_VISIBLE_DEVICES|OMP_NUM_THREADS|SLURM_(JOB_ID|JOB_NUM_NODES|NTASKS|"
    r"NNODES|NODELIST|GPUS_ON_NODE|CPUS_PER_TASK|JOB_END_TIME|RESTART_COUNT)"
)
_GIT_SECONDS = 1  # for an answer of git: a checkout may lie on a slow network disk


def record_environment(run_dir: str | Path, **chosen: Any) -> None:
    """Adds this start to `{"starts": [...]}` in RUN/env.json. Never raises. Process 0 calls it.

    Args:
      run_dir: the run directory.
      chosen: what was chosen for this start, by name; as JSON.
    """
    path = Path(run_dir) / "env.json"
    try:
        starts = json.loads(read_bytes(path))["starts"] if path.exists() else []
        write_text(path, json_text({"starts": [*starts, environment() | chosen]}, indent=2))
    except Exception as error:  # a note about a run must not end it
        say(f"WARNING: {path} was not written ({reason(error)})")


def environment() -> dict[str, Any]:
    """Versions, git state of a checkout, devices, processes, command line and machine, as JSON.

    Secrets are hidden.
    """
    import jax

    device = jax.devices()[0]
    found = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "directory": os.getcwd(),
        "host": platform.node(),
        "os": platform.platform(),
        "cpus": usable_cpus(),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),  # bytes
        "devices": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
        },
        "processes": jax.process_count(),
        "versions": versions(),
        "variables": {
            name: value for name, value in sorted(os.environ.items()) if _VARIABLES.fullmatch(name)
        },
    }
    git = _git_state(Path(inl_jax.__file__).parents[1])
    return redact(found | ({"git": git} if git else {}))


def versions() -> dict[str, str]:
    """Versions of Python, this project, and the packages under it that are installed."""
    found = {"python": platform.python_version(), "inl_jax": inl_jax.__version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def source_digest() -> str:
    """The first digits of the SHA-256 of the project's Python files, installed or checked out."""
    package, digest = Path(inl_jax.__file__).parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _git_state(root: Path) -> dict[str, Any]:
    """The commit of a checkout and whether its files were changed; empty if `root` is none."""
    if not (root / ".git").exists():  # `git -C` would find a repository around site-packages
        return {}
    command = [
        "git",
        "--no-optional-locks",
        "-C",
        root,
        "status",
        "--porcelain=v2",
        "--branch",
        "--untracked-files=no",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    commit = re.search(r"^# branch\.oid (\w+)", done.stdout, re.MULTILINE)
    if not commit:
        return {}
    changed = any(not line.startswith("#") for line in done.stdout.splitlines())
    return {"commit": commit[1], "dirty": changed}
