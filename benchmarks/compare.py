"""Which context mixer and which T reach the fewest bits per byte?

python benchmarks/compare.py --out docs/comparison.png [--config tiny] [--num_steps 1000]
    [--runs_dir runs/compare] [section.field=value ...]

Trains every mixer at several T with the same data and seed, prints a table and draws the curves.
Runs that exist are resumed or read.
"""

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from harness import make_parser, markdown
from variants import Trained, study_flags, train_variants, validations

from inl_jax.model.language_model import param_count
from inl_jax.planning.cost import flops_per_token
from inl_jax.terminal.command_line import exit_on_input_error

CONTEXTS = ("mean", "decay", "gated", "attention")
ITERATIONS = (0, 2, 5)
VARIANTS = {
    f"{context}-{iterations}": {
        "model.context": context,
        "model.num_iterations": iterations,
        "eval_every": 100,
    }
    for iterations, context in itertools.product(ITERATIONS, CONTEXTS)
    if (context, iterations) != ("mean", 0)  # nothing would read the context
}


class Curve(NamedTuple):
    """A run: validation bits per byte after some numbers of updates."""

    name: str
    context: str
    iterations: int
    parameters: int
    flops: int  # per update
    ms: float  # per update, the median
    steps: list[int]
    bits: list[float]

    def bits_at(self, budget: float) -> float:
        """Bits per byte when `budget` FLOPs are spent, interpolated linearly between updates."""
        points = list(zip((step * self.flops for step in self.steps), self.bits, strict=True))
        for (f0, b0), (f1, b1) in itertools.pairwise(points):
            if f0 <= budget <= f1:
                return b0 + (b1 - b0) * (budget - f0) / (f1 - f0)
        return self.bits[0] if budget < points[0][0] else self.bits[-1]


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("compare", __doc__)
    parser.add_argument("--out", default="docs/comparison.png", help="the picture")
    with exit_on_input_error():
        flags = study_flags(parser, argv, runs_dir="runs/compare")
        curves = [curve(run) for run in train_variants(flags, VARIANTS)]
    print(markdown(table_rows(curves)))
    draw(curves, Path(flags.out))


def curve(run: Trained) -> Curve:
    """What the table and the picture show of a run."""
    model, batch = run.config.model, run.config.batch_size * run.config.data.seq_len
    found = validations(run.history)
    return Curve(
        name=f"{model.context}, T = {model.num_iterations}",
        context=model.context,
        iterations=model.num_iterations,
        parameters=param_count(model),
        flops=3 * flops_per_token(model, run.config.data.seq_len) * batch,
        ms=1000 * statistics.median_high(r["seconds_per_step"] for r in run.history if "loss" in r),
        steps=[record["step"] for record in found],
        bits=[record["validation_bits_per_byte"] for record in found],
    )


def table_rows(curves: Sequence[Curve]) -> list[dict[str, str]]:
    """A row for each run: some points of its curve, and where it was when the cheapest one ended.

    The points are the first, the middle and the last evaluation, and multiples of 250 updates.
    """
    steps = curves[0].steps
    shown = [s for s in steps if s in {steps[0], steps[len(steps) // 2], steps[-1]} or s % 250 == 0]
    budget = min(curve.steps[-1] * curve.flops for curve in curves)
    rows = []
    for curve in curves:
        at = dict(zip(curve.steps, curve.bits, strict=True))
        row = {
            "model": curve.name,
            "parameters": f"{curve.parameters:,}",
            "GFLOP per update": f"{curve.flops / 1e9:.1f}",
            "ms per update": f"{curve.ms:.0f}",
        }
        row |= {f"{step} updates": f"{at[step]:.3f}" for step in shown}
        rows.append(row | {f"at {budget / 1e12:.0f} TFLOP": f"{curve.bits_at(budget):.3f}"})
    return rows


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Draws bits per byte against updates and against FLOPs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colour = dict(zip(CONTEXTS, ("tab:red", "tab:blue", "tab:purple", "tab:green"), strict=True))
    style = dict(zip(ITERATIONS, (":", "--", "-"), strict=True))
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for curve in curves:
        look = {"color": colour[curve.context], "linestyle": style[curve.iterations]}
        axes[0].plot(curve.steps, curve.bits, label=curve.name, **look)
        axes[1].plot([step * curve.flops / 1e12 for step in curve.steps], curve.bits, **look)
    axes[0].set(xlabel="updates", ylabel="validation bits per byte")
    axes[1].set(xlabel="training TFLOP", xscale="log")
    axes[0].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
