"""Trains one config by every recipe that saves memory, and compares where the loss ends.

python scripts/recipes.py [--config tiny] [--num_steps 1000] [--runs_dir runs/recipes]
    [section.field=value ...]

Parameters are bfloat16. Runs that are already there are resumed or read.
"""

import argparse

from inl_jax import load_config, train
from inl_jax.cli.command_line import exit_on_input_error

STOCHASTIC = ["optim.moment_dtype=bfloat16", "optim.rounding=stochastic"]
HOST = ["optim.state_memory=pinned_host"]
RECIPES = {  # the first is what the others are held against
    "float32 masters and moments": [],
    "(a) bfloat16 moments, stochastic rounding": STOCHASTIC,
    "(b) masters and moments on the host": HOST,
    "(c) both": [*STOCHASTIC, *HOST],
    "(d) adafactor, stochastic rounding": [
        "optim.optimizer=adafactor",
        "optim.rounding=stochastic",
    ],
    "(b) and gradients of 4 micro-batches added in bfloat16": [
        *HOST,
        "accumulate_steps=4",
        "optim.accumulator_dtype=bfloat16",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--num_steps", type=int, default=1000)
    parser.add_argument("--runs_dir", default="runs/recipes")
    parser.add_argument("overrides", nargs="*", help="section.field=value, for every run")
    flags = parser.parse_args()
    with exit_on_input_error():
        losses = {
            name: final_loss(flags, i, recipe) for i, (name, recipe) in enumerate(RECIPES.items())
        }
    base, *_ = losses.values()
    print("| recipe | validation loss at the end | beside the first |\n|---|---|---|")
    for name, loss in losses.items():
        print(f"| {name} | {loss:.4f} | {100 * (loss / base - 1):+.2f}% |")


def final_loss(flags, i: int, recipe: list[str]) -> float:
    config = load_config(
        flags.config,
        [
            "model.param_dtype=bfloat16",
            f"num_steps={flags.num_steps}",
            "eval_sequences=0",
            "sample_every=0",
            f"run_dir={flags.runs_dir}/{i}",
            *recipe,
            *flags.overrides,
        ],
    )
    return [r["validation_loss"] for r in train(config).history if "validation_loss" in r][-1]


if __name__ == "__main__":
    main()
