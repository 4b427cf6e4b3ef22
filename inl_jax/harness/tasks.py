"""Tasks of lm-evaluation-harness on a model: `evaluate_tasks`, and the table of its results."""

import contextlib
import importlib.util
import logging
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from inl_jax.config import InputError
from inl_jax.console import first_line, plural, say
from inl_jax.guest import own_logging, own_random
from inl_jax.model.losses import Chunk
from inl_jax.other_names import closest
from inl_jax.sampling import LanguageModel
from inl_jax.storage.run_dir import read_config

FOLDER = Path(__file__).parent
"""Our own tasks, for `lm_eval --include_path`."""
RESAMPLES = 1000  # for standard errors without a formula; lm_eval takes 100 times as many
# Of the results of lm_eval; the others say how each task is defined.
_KEPT = (
    "results",
    "groups",
    "group_subtasks",
    "versions",
    "n-shot",
    "higher_is_better",
    "n-samples",
)


def load_tasks(
    run_dir: str | Path,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    gen_kwargs: str | None = None,
    include_path: str | Path | None = None,
    metadata: Mapping[str, Any] | None = None,
    run_unsafe_code: bool = False,
) -> dict[str, Any]:
    """Tasks with their data, for `evaluate_tasks`.

    Args:
      run_dir: the run, whose text, tokenizer and length a task may need.
      tasks: names or patterns of tasks, groups and tags, or YAML files of tasks.
      num_fewshot: examples before each question; None: as each task says.
      gen_kwargs: settings for every task that generates, as "max_gen_toks=64,top_k=40".
      include_path: a folder with more tasks.
      metadata: for tasks that make their own data.
      run_unsafe_code: allow tasks that run the code which the model writes.

    Raises:
      InputError: lm_eval is not installed; or a task is unknown, cannot run here, or has no data.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("--tasks: needs lm_eval; pip install 'inl_jax[harness]'")
    max_seq_len = read_config(run_dir).model.max_seq_len
    known = {
        "checkpoint": str(run_dir),
        "tokenizer": str(run_dir),
        "max_seq_lengths": [max_seq_len],
    }
    with _apart():
        found = _load(tasks, include_path, known | dict(metadata or {}))
        for name, task in found["tasks"].items():
            _check(name, task, run_unsafe_code)
            _configure(task, num_fewshot, gen_kwargs)
            _try(name, task, max_seq_len)
    return found


def evaluate_tasks(
    model: LanguageModel,
    tasks: dict[str, Any],
    *,
    batch_size: int = 16,
    loss_chunk: Chunk = "auto",
    limit: float | None = None,
) -> dict[str, Any]:
    """What lm_eval finds for each task and group, as an object for JSON.

    Args:
      model: of a run, on its mesh.
      tasks: from `load_tasks`.
      batch_size: rows read at a time; a multiple of `batch_shards(model.mesh)`.
      loss_chunk: tokens of one device whose logits exist at once, as in TrainConfig.
      limit: questions of each task, or a fraction below 1 of them; None: all.

    Raises:
      InputError: a task wants what the model cannot do.
    """
    with _apart():
        from lm_eval import __version__, evaluator

        from inl_jax.harness.adapter import RunLM

        adapter = RunLM(model, batch_size=batch_size, loss_chunk=loss_chunk)
        results = evaluator.evaluate(
            adapter,
            tasks,
            limit=limit,
            bootstrap_iters=RESAMPLES,
            log_samples=False,
            confirm_run_unsafe_code=True,  # load_tasks has asked
        )
    say(f"{adapter.scorer.tokens_read:,} tokens read for log-likelihoods")
    return {key: results[key] for key in _KEPT if key in results} | {"lm_eval": __version__}


def table(results: Mapping[str, Any]) -> str:
    """The results as lm_eval prints them: a table of tasks and, if there are any, one of groups."""
    from lm_eval.utils import make_table

    groups = [make_table(results, "groups")] if results.get("groups") else []
    return "\n".join([make_table(results), *groups]).rstrip()


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Keeps lm_eval out of stdout, logs and the state of random numbers, and from forking.

    It computes standard errors in forked processes, which hang if JAX has started threads.
    """
    log, numpy_state = logging.getLogger("lm_eval"), np.random.get_state()
    level, forks = log.level, os.environ.get("DISABLE_MULTIPROC")
    log.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stdout(sys.stderr), own_logging(), own_random():
            random.seed(0)  # as lm_eval does: tasks draw their examples and texts
            np.random.seed(1234)
            yield
    finally:
        log.setLevel(level)
        np.random.set_state(numpy_state)
        if forks is None:
            del os.environ["DISABLE_MULTIPROC"]


def _load(tasks: Sequence[str], include_path, metadata: dict[str, Any]) -> dict[str, Any]:
    """Tasks and groups by name, as `evaluator.evaluate` takes them."""
    from lm_eval.tasks import TaskManager

    folders = [str(FOLDER), *([str(include_path)] if include_path else [])]
    # Some 15,000 tasks come with lm_eval, and take half a minute to list.
    manager = TaskManager(include_path=folders, include_defaults=False, metadata=metadata)
    if not all(_named(manager, task) for task in tasks):
        manager = TaskManager(include_path=folders, metadata=metadata)
    found = {"tasks": {}, "groups": {}, "group_map": {}}
    for task in tasks:
        names = _named(manager, task)
        if Path(task).suffix == ".yaml" and not Path(task).is_file():
            raise InputError(f"--tasks {task}: there is no such file")
        if not names:
            raise InputError(f"--tasks {task}: no such task{closest(task, manager.all_tasks)}")
        with _one_line(task):
            for part, entries in manager.load(names).items():
                found[part] |= entries
    return found


def _named(manager: Any, task: str) -> list[str]:
    """The names of tasks that `task` means, or the file; empty if there are none."""
    return [task] if Path(task).suffix == ".yaml" else manager.match_tasks([task])


@contextlib.contextmanager
def _one_line(task: str) -> Iterator[None]:
    """Says in one line why a task cannot be loaded: what is missing comes as errors of any kind."""
    try:
        yield
    except InputError:
        raise
    except ImportError as error:
        raise InputError(
            f"--tasks {task}: needs a package ({first_line(error)}); install it"
        ) from error
    except OSError as error:  # those of the hub are
        raise InputError(
            f"--tasks {task}: its data is not on this machine and cannot be fetched "
            f"({first_line(error)}); run lm_eval once where there is a network, and copy "
            "~/.cache/huggingface from there, or name its copy by HF_HOME; HF_HUB_OFFLINE=1 saves "
            "the attempts to reach the hub"
        ) from error
    except Exception as error:
        raise InputError(
            f"--tasks {task}: lm_eval cannot load it ({type(error).__name__}: "
            f"{first_line(error)}); mend it, or leave it out"
        ) from error


def _check(name: str, task: Any, run_unsafe_code: bool) -> None:
    if getattr(task, "UNSAFE_CODE", False) and not run_unsafe_code:
        raise InputError(
            f"--tasks {name}: runs code that the model writes; add --confirm_run_unsafe_code if "
            "nothing on this machine can be harmed"
        )
    if getattr(task, "MULTIMODAL", False):
        raise InputError(f"--tasks {name}: shows images, and the model reads text; leave it out")


def _configure(task: Any, num_fewshot: int | None, gen_kwargs: str | None) -> None:
    """Sets what the user gave. A task that wants no examples gets none, as in lm_eval."""
    from lm_eval.utils import simple_parse_args_string

    if num_fewshot is not None and task.get_config("num_fewshot") != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=1234)  # as in lm_eval
    given = simple_parse_args_string(gen_kwargs)
    if given and task.get_config("output_type") == "generate_until":
        task.set_config(key="generation_kwargs", value=given, update=True)


def _try(name: str, task: Any, max_seq_len: int) -> None:
    """Makes the requests of one question, and reads the task's settings of generation.

    So what a task lacks is said before the model is read.
    """
    from inl_jax.harness.adapter import generation_settings

    if task.OUTPUT_TYPE == "generate_until":
        generation_settings(task.config.generation_kwargs or {}, max_seq_len)
    with _one_line(name):
        try:
            task.build_all_requests(limit=1)
        except Exception as error:
            shots, documents = task.config.num_fewshot, len(list(task.fewshot_docs()))
            if shots and shots >= documents:
                raise InputError(
                    f"--num_fewshot {shots}: --tasks {name} has {plural(documents, 'document')} "
                    f"to take examples from; lower it to {max(0, documents - 1)}"
                ) from error
            raise
    task.set_fewshot_seed(seed=1234)  # as before: the try has drawn from it
