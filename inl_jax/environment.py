"""Where a run was started: versions, devices, command and machine, without secrets.

RUN/env.json holds one entry for each start, so that a run resumed on another machine still says
where its first part ran.
"""

import datetime
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
from inl_jax.console import first_line, say

HIDDEN = "[hidden]"

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
)
# Of the environment only these variables are recorded. Slurm has others that are secret.
_VARIABLES = re.compile(
    r"(JAX|XLA|NCCL)_\w+|CUDA_VISIBLE_DEVICES|OMP_NUM_THREADS|SLURM_(JOB_ID|JOB_NUM_NODES|NTASKS|"
    r"NNODES|NODELIST|GPUS_ON_NODE|CPUS_PER_TASK|JOB_END_TIME|RESTART_COUNT)"
)
_GIT_SECONDS = 1  # for an answer of git: a checkout may lie on a slow network disk

_SECRET_NAME = r"[\w.-]*(?:token|key|passw(?:or)?d|secret|credentials?)"
_SECRETS = (
    re.compile(  # --hub_token VALUE, PASSWORD=VALUE, "api_key": "VALUE"
        rf"(?P<before>--{_SECRET_NAME}(?:\s+|=)|\b{_SECRET_NAME}[\"']?\s*[=:]\s*)"
        r"(?:\"[^\"]*\"|'[^']*'|[^\s\"',&]+)",
        re.IGNORECASE,
    ),
    re.compile(r"(?P<before>\bbearer\s+)\S+", re.IGNORECASE),
    re.compile(r"(?P<before>://)[^/\s@]+(?=@)"),  # user:password in an address
    re.compile(  # of Hugging Face, GitHub, OpenAI and AWS
        r"(?P<before>)\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_\w{16,}|github_pat_\w{16,}|sk-[\w-]{16,}"
        r"|AKIA[A-Z0-9]{12,})"
    ),
)


def record_environment(run_dir: str | Path) -> None:
    """Adds this start to `{"starts": [...]}` in RUN/env.json. Never raises. Process 0 calls it."""
    path = Path(run_dir) / "env.json"
    try:
        starts = json.loads(path.read_text())["starts"] if path.exists() else []
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps({"starts": [*starts, environment()]}, indent=2))
        os.replace(temporary, path)
    except Exception as error:  # a note about a run must not end it
        say(f"WARNING: {path} was not written ({first_line(error)})")


def environment() -> dict[str, Any]:
    """Versions, git state of a checkout, devices, processes, command line and machine, as JSON."""
    import jax

    device = jax.devices()[0]
    found = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": redact(shlex.join(sys.orig_argv)),
        "directory": os.getcwd(),
        "host": platform.node(),
        "os": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),  # bytes
        "devices": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
        },
        "processes": jax.process_count(),
        "versions": versions(),
        "variables": {
            name: redact(value)
            for name, value in sorted(os.environ.items())
            if _VARIABLES.fullmatch(name)
        },
    }
    git = _git_state(Path(inl_jax.__file__).parents[1])
    return found | ({"git": git} if git else {})


def versions() -> dict[str, str]:
    """Versions of Python, this project, and the packages under it that are installed."""
    found = {"python": platform.python_version(), "inl_jax": inl_jax.__version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def redact(text: str) -> str:
    """`text` with everything that looks like a secret replaced by `[hidden]`.

    That is: values of names that end in token, key, password, secret or credentials; users and
    passwords in addresses; known kinds of tokens; and the values of environment variables with such
    names, wherever they stand.
    """
    for name, value in os.environ.items():
        if len(value) >= 8 and re.fullmatch(_SECRET_NAME, name, re.IGNORECASE):
            text = text.replace(value, HIDDEN)
    for secret in _SECRETS:
        text = secret.sub(rf"\g<before>{HIDDEN}", text)
    return text


def _git_state(root: Path) -> dict[str, Any]:
    """The commit of a checkout and whether its files were changed; empty if `root` is none."""
    if not (root / ".git").exists():  # `git -C` would find a repository around site-packages
        return {}
    command = ["git", "-C", root, "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    commit = re.search(r"^# branch\.oid (\w+)", done.stdout, re.MULTILINE)
    if not commit:
        return {}
    changed = any(not line.startswith("#") for line in done.stdout.splitlines())
    return {"commit": commit[1], "dirty": changed}
