"""The checklist before a run: the checks that `train` makes, and the choices of its config."""

import contextlib
import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from inl_jax.checks import require, shown
from inl_jax.config import InputError, TrainConfig
from inl_jax.console import first_line
from inl_jax.curriculum import make_curriculum, read_so_far
from inl_jax.data.corpus import Corpus
from inl_jax.environment import versions
from inl_jax.failures import MachineFailure
from inl_jax.initial_weights import check_start, kept_tokenizer
from inl_jax.model.layers import compute_dtype
from inl_jax.model.mixers.attention import attention_kernel
from inl_jax.model.mosaic.run_mosaic import integrator_kernel
from inl_jax.orbax import ocp
from inl_jax.parallel import processes
from inl_jax.parallel.sharding import on
from inl_jax.planning.preflight import (
    DATA_CHECKS,
    MACHINE_CHECKS,
    Check,
    Finding,
    check_recipe,
    check_same_config,
    count_steps,
    examine,
    make_plan,
    nearest_directory,
    read_corpus,
    warn,
)
from inl_jax.storage.identity import steps_on_disk
from inl_jax.storage.run_dir import has_begun, pinned
from inl_jax.training.step import compile_step
from inl_jax.training.trackers import check_trackers

_ORDER = ("ok", "not checked", "warning", "failed")


def check_setup(config: TrainConfig) -> None:
    """Says what is wrong with the software, the driver or the run directory. `train` calls it.

    Raises:
      InputError: `config` is none, a kernel or a tracker is not here, or the run
        directory cannot be written.
    """
    found = f"config={shown(config)}: must be a TrainConfig, as `load_config` gives"
    require(isinstance(config, TrainConfig), found)
    for check in examine(SETUP_CHECKS, config):
        warn(check)


def checklist(
    config: TrainConfig, *, skip_data: bool = False, compiled: bool = False
) -> list[Check]:
    """Makes all checks, whatever fails. Every process calls it; the run directory stays as it is.

    Args:
      config: the run, as asked for.
      skip_data: leave out the checks of the data. Otherwise the text is tokenised into the cache,
        as `train` would do.
      compiled: compile the training step as well.

    Returns:
      The checks; of several processes each as it is on the first one where it is worst.

    Raises:
      InputError: the processes have different configs, or one of several cannot read the data.
    """
    check_same_config(config)
    rows = _tried(CHOICES | SETUP_CHECKS, config)
    try:
        plan = make_plan(config)
        rows += _tried(MACHINE_CHECKS | {"recipe": check_recipe}, config, *plan)
        rows += _tried({"compiled step": _check_step}, *plan) if compiled else []
    except InputError as error:
        rows += [_failed("devices", error), *_not_checked([*list(MACHINE_CHECKS)[1:], "recipe"])]
    corpus = None
    if skip_data:
        rows += _not_checked(["data", *DATA_CHECKS])
    else:
        try:
            config = pinned(config)
            corpus = read_corpus(config, kept_tokenizer(config))
            rows += [Check("data", ", ".join(config.data.paths), "", "ok")]
            rows += _tried(DATA_CHECKS, config, corpus)
        except InputError as error:
            if jax.process_count() > 1:  # the others may wait for this one
                raise
            rows += [_failed("data", error), *_not_checked(DATA_CHECKS)]
    rows += _tried({"run in run_dir": _check_run}, config, corpus)
    return _of_all_processes(rows)


def as_table(checks: Sequence[Check]) -> str:
    """The checks for people, one a line: verdict, name, what was found, what is wanted."""
    verdict, name = (max(len(c[i]) for c in checks) for i in (3, 0))
    lines = []
    for c in checks:
        wanted = f"; wanted: {c.wanted}" if c.wanted else ""
        lines.append(f"{c.verdict:{verdict}}  {c.name:{name}}  {c.found}{wanted}".rstrip())
    return "\n".join(lines)


def _tried(checks: Mapping[str, Callable[..., Finding]], *args) -> list[Check]:
    rows = []
    for name, check in checks.items():
        try:
            rows += examine({name: check}, *args)
        except (InputError, MachineFailure, OSError) as error:
            rows += [_failed(name, error)]
    return rows


def _failed(name: str, error: Exception) -> Check:
    return Check(name, str(error), "", "failed")


def _not_checked(names: Iterable[str]) -> list[Check]:
    return [Check(name, "", "", "not checked") for name in names]


def _of_all_processes(rows: list[Check]) -> list[Check]:
    """The worst of each check over the processes, which make the same checks."""
    gathered = [json.loads(text) for text in processes.gather(json.dumps(rows))]
    return [
        max(map(Check._make, same), key=lambda check: _ORDER.index(check.verdict))
        for same in zip(*gathered, strict=True)
    ]


def _check_step(config, mesh, layout) -> Finding:
    start = time.perf_counter()
    try:
        with on(mesh):
            compile_step(config, mesh, layout)
    except RuntimeError as error:
        raise InputError(first_line(error)) from None
    return f"{time.perf_counter() - start:.1f} s", "", "ok"


def _check_versions(config: TrainConfig) -> Finding:
    found = {name: version for name, version in versions().items() if name.startswith("jax")}
    release = re.match(r"[\d.]+", found["jaxlib"])[0]
    fits = found["jax"].split(".")[:2] == release.split(".")[:2] and all(
        re.match(r"[\d.]+", version)[0] == release
        for name, version in found.items()
        if name.endswith("-plugin")  # JAX leaves out a plugin of another version
    )
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    return text, f"jax and plugins that fit jaxlib {release}", "ok" if fits else "warning"


_LEAST_DRIVER = {"jax-cuda13-plugin": 580, "jax-cuda12-plugin": 525}  # of the CUDA of each
_DRIVER_FILE = Path("/proc/driver/nvidia/version")


def _check_driver(config: TrainConfig) -> Finding:
    if not _DRIVER_FILE.exists():
        return "no NVIDIA driver", "one, for a GPU", "not checked"
    driver = re.search(r"\b\d{3}\.[\d.]+", _DRIVER_FILE.read_text())[0]
    plugin = next((name for name in _LEAST_DRIVER if name in versions()), None)
    if plugin is None:
        return f"{driver}, and no CUDA plugin of JAX", "pip install 'inl_jax[cuda]'", "warning"
    least = _LEAST_DRIVER[plugin]
    fits = int(driver.split(".")[0]) >= least
    return driver, f"{least} or newer, for {plugin}", "ok" if fits else "warning"


def _check_precision(config: TrainConfig) -> Finding:
    products = compute_dtype(config.model).name
    if jax.default_backend() == "gpu" and products != "bfloat16":
        return products, "bfloat16 (--model.compute_dtype bfloat16), which is faster", "warning"
    return f"{products} products, {config.model.param_dtype} parameters", "", "ok"


def _check_kernel(config: TrainConfig) -> Finding:
    if not config.model.uses_attention:
        return f"none, in the {config.model.context_text}", "", "ok"
    return attention_kernel(config.model), "", "ok"  # raises if this machine cannot run it


def _check_integrator(config: TrainConfig) -> Finding:
    return integrator_kernel(config.model), "", "ok"  # raises if this machine cannot run it


def _check_trackers(config: TrainConfig) -> Finding:
    check_trackers(config.track)
    return ", ".join(("console", "metrics.jsonl", *config.track)), "", "ok"


def _check_run_dir(config: TrainConfig) -> Finding:
    directory = nearest_directory(config.run_dir)
    if jax.process_count() == 1:  # several also try to write, in check_shared
        try:
            tempfile.TemporaryFile(dir=directory).close()
        except OSError as error:
            raise InputError(
                f"run_dir={config.run_dir}: {error.strerror}; name a directory"
            ) from None
    processes.check_shared(directory, "run_dir")
    return config.run_dir, "writable, and shared by all processes", "ok"


SETUP_CHECKS = {
    "versions": _check_versions,
    "driver": _check_driver,
    "precision": _check_precision,
    "attention kernel": _check_kernel,
    "integrator kernel": _check_integrator,
    "monitoring": _check_trackers,
    "run directory": _check_run_dir,
}


def _check_run(config: TrainConfig, corpus: Corpus | None) -> Finding:
    """Whether the run in the run directory, if there is one, can be resumed."""
    found: list[str] = []
    check_start(config, None if corpus is None else corpus.tokenizer, tell=found.append)
    if not has_begun(config.run_dir):
        return "; ".join(["none", *found]), "", "ok"
    step, position = _newest_position(config.run_dir)
    if corpus is not None and position:
        read, samples = read_so_far(position, config, corpus), position["samples_seen"]
        num_steps = count_steps(config, corpus, step=step, position=samples)
        make_curriculum(config, num_steps, step=step, position=samples, read=read)
    return "; ".join([f"at update {step}", *found]), "the same model and tokenizer", "ok"


def _newest_position(run_dir: str) -> tuple[int, dict[str, Any]]:
    """The step of the newest checkpoint that can be read, and its position; (0, {}) without one.

    Several processes find none: if one of them could not read, Orbax would let the others wait.
    """
    folder = Path(run_dir).absolute() / "checkpoints"
    for step in reversed(steps_on_disk(run_dir) if jax.process_count() == 1 else []):
        with contextlib.suppress(Exception):  # Orbax raises many types for bad bytes
            if position := ocp.checkpointables_metadata(folder / str(step)).custom_metadata:
                return step, position
    return 0, {}


def _check_saves(config: TrainConfig) -> Finding:
    if config.save_every == 0:
        return "only at the end", "--save_every N, to resume a run that is killed", "warning"
    return f"every {config.save_every} updates, {config.keep_last} and the best kept", "", "ok"


def _check_evaluation(config: TrainConfig) -> Finding:
    if config.eval_every == 0:
        return "only at the end", "--eval_every N, to see over-fitting and keep the best", "warning"
    if config.data.validation_fraction == 0:
        return "no text", "--data.validation_fraction 0.01", "warning"
    return f"every {config.eval_every} updates", "", "ok"


_MOST_PULL = {"gated": 0.3, "attention": 0.2}  # docs/learning.md; with decay 0.48 did no harm


def _check_pull(config: TrainConfig) -> Finding:
    """How much of the normalised stream a block's iterations take away when training begins."""
    c = config.model
    if c.num_iterations == 0 or c.context == "mean":
        return "none", "", "ok"
    x, v, gate = 1.0, 0.0, 0.5  # as `Integrator` starts: the mean of tokens, far from mu
    for _ in range(c.num_iterations):
        alpha = 0.8 * -math.expm1(-c.kappa * abs(x))
        v = alpha * v - min(c.initial_beta, 2 / c.dt) * x
        x += c.dt * gate * v
    most = _MOST_PULL.get(c.context, 1)
    text = f"takes {1 - x:.0%} of the stream in a block, at the start"
    if 1 - x <= most:
        return text, "", "ok"
    advice = f"{most:.0%} at most: --model.initial_beta 0.02 (docs/learning.md)"
    return text, advice, "warning"


CHOICES = {
    "checkpoints": _check_saves,
    "evaluation": _check_evaluation,
    "pull to mu": _check_pull,
}
