"""What do fewer iterations, or tokens that stop early, save, and what do they cost?

inl train --config tiny --model.num_iterations 8 --model.dt 0.1 --run_dir runs/depth
python benchmarks/depth.py runs/depth [--tols 0.01 0.1] [--sequences 128] [--json]

A row is one depth of the same weights: a number of iterations for every token, or the trained
number with a tol. Times are beside those of the trained depth, in turns with it: of the evaluation,
and of tokens that are decoded one by one, prefill included.
"""

import dataclasses
from collections.abc import Sequence

from harness import Report, check_iterations, flags_only, interleaved, main, number, ratios

from inl_jax.config import ModelConfig
from inl_jax.data.batches import eval_batches
from inl_jax.data.corpus import prepare
from inl_jax.evaluation import evaluate
from inl_jax.sampling import LanguageModel, generate
from inl_jax.storage.run_dir import read_config
from inl_jax.terminal.command_line import Parser

TOLS = [0.02, 0.025, 0.03, 0.035, 0.04, 0.05]


def depth(parser: Parser, argv: Sequence[str]) -> Report:
    parser.add_run()
    parser.add_argument("--step", default="latest", help="latest, best, or a saved update")
    parser.add_argument("--tols", type=float, nargs="+", default=TOLS, help=f"{TOLS} by default")
    parser.add_argument("--sequences", type=int, help="validation windows; all by default")
    number(parser, "--new_tokens", 64, "tokens to decode")
    number(parser, "--rounds", 3, "measurements of each time")
    flags = flags_only(parser, argv)
    model = LanguageModel.from_run(flags.checkpoint, step=flags.step)
    check_iterations(model.config)
    data = read_config(flags.checkpoint).data
    windows = eval_batches(
        prepare(data, tokenizer=model.tokenizer),
        seq_len=data.seq_len,
        batch_size=16,
        max_sequences=flags.sequences or 0,
    )
    batches = list(windows)
    prompt = batches[0].inputs[0, : data.seq_len // 4].tolist()

    models = depths(model.config, flags.tols)
    trained = models.index(model.config)
    found = [[evaluate(m, model.params, batches) for m in models] for _ in range(flags.rounds)]
    seconds = interleaved(
        {
            i: lambda m=m: generate(m, model.params, [prompt], max_new_tokens=flags.new_tokens)
            for i, m in enumerate(models)
        },
        flags.rounds,
    )
    rows = []
    for i, (m, result) in enumerate(zip(models, found[0], strict=True)):
        times = [[one[j].seconds for one in found] for j in (i, trained)]
        rows.append(
            {
                "iterations": m.num_iterations,
                "tol": m.tol,
                "steps_per_token": result.steps_per_token,
                "steps_saved": 1 - result.steps_per_token / model.config.num_iterations,
                "bits_per_byte": result.bits_per_byte,
                "evaluation_time": ratios(*times)[0],
                "decode_time": ratios(seconds[i], seconds[trained])[0],
            }
        )
    note = f"{flags.checkpoint}, {model.config.context_text}, T = {model.config.num_iterations}; "
    note += f"{found[0][0].tokens:,} validation tokens; {flags.new_tokens} tokens decoded, batch 1"
    return Report({}, rows, [note])


def depths(model: ModelConfig, tols: Sequence[float]) -> list[ModelConfig]:
    """Every number of iterations up to the trained one and two more; then the tols."""
    least, T = 1 if model.context == "mean" else 0, model.num_iterations
    fixed = [dataclasses.replace(model, num_iterations=t) for t in [*range(least, T + 1), T + 2]]
    return fixed + [dataclasses.replace(model, tol=tol) for tol in tols]


if __name__ == "__main__":
    main(depth)
