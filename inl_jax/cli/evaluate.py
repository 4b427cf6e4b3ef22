"""Computes loss, perplexity and bits per byte of a run, on its validation split or on any text.

inl evaluate runs/tiny [--data PATH ...] [--column body] [--step best] [--json]
inl evaluate runs/tiny --tasks hellaswag,arc_easy [--num_fewshot 5] [--limit 100] [--json]

With --iterations or --tol, tokens take fewer steps of the integrator than in training, or more.
Tasks are those of lm-evaluation-harness; bpb, needle and stdlib_choice need no network.
"""

import dataclasses
from collections.abc import Sequence

from inl_jax.config import InputError
from inl_jax.console import plural, say, show
from inl_jax.files import json_text
from inl_jax.terminal import signals
from inl_jax.terminal.command_line import (
    Parser,
    add_depth_flags,
    add_mesh_flags,
    at_depth,
    lines_on_stderr,
    mesh_from,
)
from inl_jax.terminal.task_flags import (
    add_task_flags,
    are_tasks_named,
    show_results,
    tasks_from,
)

# Fields of data that other text may need, and what they are.
OF_DATA = {
    "hf_split": "split to read of --data",
    "bad_utf8": "replace, or error",
    "cache_dir": "where prepared tokens are kept",
}


def main(argv: Sequence[str]) -> int:
    """The verb; returns the exit code."""
    parser = Parser("evaluate", __doc__)
    parser.add_run()
    parser.add_argument("--step", default="latest", help="latest, best, or a saved update")
    parser.add_argument("--data", nargs="+", help="sources as in data.paths; all of their text")
    parser.add_argument(
        "--column",
        "--data.column",
        metavar="NAME",
        help="text column of --data; the run's if it is there, else found by name",
    )
    for field, text in OF_DATA.items():
        parser.add_argument(f"--data.{field}", help=f"{text}; the run's by default")
    parser.add_argument(
        "--seq_len", "--data.seq_len", type=int, help="tokens per window; the run's by default"
    )
    parser.add_argument("--batch_size", type=int, default=16, help="windows at a time")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    add_depth_flags(parser)
    add_mesh_flags(parser)
    add_task_flags(parser)
    flags = parser.parse_flags(argv)
    for name in ("batch_size", "seq_len"):
        if (value := getattr(flags, name)) is not None and value < 1:
            raise InputError(f"--{name} {value}: must be positive")
    if flags.column and not flags.data:
        raise InputError(f"--column {flags.column}: of --data, which is not given; give both")
    if are_tasks_named(flags):
        with lines_on_stderr():
            results = run_tasks(flags)
        show_results(flags, results)
        return 0
    from inl_jax.evaluation import scores_by_name

    with lines_on_stderr():
        result, model, data = evaluate_run(flags)
    rate = result.tokens / result.seconds
    if flags.json:
        depth = {"iterations": model.num_iterations, "tol": model.tol}
        sources = {"sources": scores_by_name(result, data)}
        show(json_text(result._asdict() | sources | depth | {"tokens_per_second": rate}))
        return 0
    text = ", ".join(flags.data) if flags.data else f"validation split of {', '.join(data.paths)}"
    depth = ""
    if (flags.iterations, flags.tol) != (None, None):
        depth = f", {plural(model.num_iterations, 'iteration')}, tol {model.tol:g}"
        depth += f" ({result.steps_per_token:.3f} steps per token and block)"
    show(
        f"{flags.checkpoint} ({flags.step}) on {text}{depth}: loss {result.loss:.6f} nats/token, "
        f"perplexity {result.perplexity:.4f}, {result.bits_per_byte:.6f} bits/byte over "
        f"{result.tokens:,} tokens; {rate:,.0f} tokens/s"
    )
    return 0


def evaluate_run(flags):
    """The `Evaluation`, the `ModelConfig` that was evaluated, and the `DataConfig` of its text."""
    # Imported late: a mistake on the command line is answered before JAX starts.
    from inl_jax.data.batches import check, eval_batches
    from inl_jax.data.corpus import prepare
    from inl_jax.evaluation import evaluate
    from inl_jax.storage.run_dir import read_config, warn_without_records
    from inl_jax.text.columns import MissingColumn

    signals.unwind()
    config = read_config(flags.checkpoint)
    model = read_model(flags)
    given = {field: getattr(flags, f"data.{field}") for field in OF_DATA}
    given = {field: value for field, value in given.items() if value is not None}
    data = dataclasses.replace(config.data, **given)
    if flags.data:
        data = dataclasses.replace(
            data,
            paths=tuple(flags.data),
            weights=(),
            phases=(),
            validation_fraction=1.0,
            column=flags.column or data.column,
            max_documents=0,
        )
    else:
        split = f"the validation split of {', '.join(data.paths)}"
        warn_without_records(flags.checkpoint, f"{split}; name text by --data")
    phases = tuple(dataclasses.replace(phase, seq_len=0) for phase in data.phases)
    data = dataclasses.replace(data, seq_len=flags.seq_len or data.seq_len, phases=phases)
    dataclasses.replace(config, data=data)  # checks the length against the model
    try:
        corpus = prepare(data, tokenizer=model.tokenizer)
    except MissingColumn:  # the run's column is of its own files
        if flags.column or not flags.data:
            raise
        say(f"data.column={data.column}: not in --data; the text column is found by name")
        data = dataclasses.replace(data, column="")
        corpus = prepare(data, tokenizer=model.tokenizer)
    check(corpus, model.config.vocab_size)
    batches = eval_batches(corpus, seq_len=data.seq_len, batch_size=flags.batch_size)
    found = evaluate(
        model.config, model.params, batches, mesh=model.mesh, loss_chunk=config.loss_chunk
    )
    return found, model.config, data


def run_tasks(flags):
    """The results of the tasks that the flags name."""
    from inl_jax.harness.tasks import evaluate_tasks
    from inl_jax.storage.run_dir import read_config

    signals.unwind()
    tasks = tasks_from(flags)
    model = read_model(flags)
    results = evaluate_tasks(
        model,
        tasks,
        batch_size=flags.batch_size,
        loss_chunk=read_config(flags.checkpoint).loss_chunk,
        limit=flags.limit,
    )
    return {"iterations": model.config.num_iterations, "tol": model.config.tol} | results


def read_model(flags):
    """The run's `LanguageModel`, at the depth and on the mesh that the flags name."""
    from inl_jax.parallel.sharding import batch_shards
    from inl_jax.planning.programs.xla import use_compile_cache
    from inl_jax.sampling import LanguageModel
    from inl_jax.storage.run_dir import read_config

    at_depth(read_config(flags.checkpoint).model, flags)  # a mistake is told before a long read
    use_compile_cache()
    mesh = mesh_from(flags)
    if mesh is not None and flags.batch_size % batch_shards(mesh):
        raise InputError(
            f"--batch_size {flags.batch_size}: must be a multiple of the {batch_shards(mesh)} "
            "devices that split the rows (--mesh.data x --mesh.fsdp)"
        )
    with signals.held():
        model = LanguageModel.from_run(flags.checkpoint, step=flags.step, mesh=mesh)
    return dataclasses.replace(model, config=at_depth(model.config, flags))
