"""How much loss does each recipe cost that saves memory?

python benchmarks/recipes.py [--config tiny] [--num_steps 1000] [--runs_dir runs/recipes]
    [section.field=value ...]

Trains the config with bfloat16 parameters by every recipe and compares the validation losses at the
end. Runs that exist are resumed or read.
"""

from collections.abc import Sequence

from harness import make_parser, markdown
from variants import Trained, study_flags, train_variants, validations

from inl_jax.terminal.command_line import exit_on_input_error

STOCHASTIC = {"optim.moment_dtype": "bfloat16", "optim.rounding": "stochastic"}
HOST = {"optim.state_memory": "pinned_host"}
RECIPES = {  # the first is the base of the comparison
    "float32 masters and moments": {},
    "(a) bfloat16 moments, stochastic rounding": STOCHASTIC,
    "(b) masters and moments on the host": HOST,
    "(c) both": STOCHASTIC | HOST,
    "(d) adafactor, stochastic rounding": {
        "optim.optimizer": "adafactor",
        "optim.rounding": "stochastic",
    },
    "(b) and gradients of 4 micro-batches added in bfloat16": HOST
    | {"accumulate_steps": 4, "optim.accumulator_dtype": "bfloat16"},
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("recipes", __doc__)
    with exit_on_input_error():
        flags = study_flags(parser, argv, runs_dir="runs/recipes")
        variants = {
            str(i): {"model.param_dtype": "bfloat16"} | recipe
            for i, recipe in enumerate(RECIPES.values())
        }
        trained = train_variants(flags, variants)
    print(markdown(table_rows(trained)))


def table_rows(trained: Sequence[Trained]) -> list[dict[str, str]]:
    """A row for each recipe, in the order of `RECIPES`."""
    losses = [validations(run.history)[-1]["validation_loss"] for run in trained]
    return [
        {
            "recipe": name,
            "validation loss at the end": f"{loss:.4f}",
            "beside the first": f"{100 * (loss / losses[0] - 1):+.2f}%",
        }
        for name, loss in zip(RECIPES, losses, strict=True)
    ]


if __name__ == "__main__":
    main()
