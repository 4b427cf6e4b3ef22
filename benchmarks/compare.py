"""Trains context mixers at several T on the same data and seed, and compares bits per byte.

python scripts/compare.py --out docs/comparison.png [--num_steps 1000] [--runs_dir runs/compare]

Runs that are already there are resumed or read. Draws the curves and prints the table.
"""

import argparse
import itertools
from pathlib import Path

from inl_jax import load_config, param_count, train
from inl_jax.cli.command_line import exit_on_input_error
from inl_jax.planning.cost import flops_per_token

CONTEXTS = ("mean", "decay", "attention")
ITERATIONS = (0, 2, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--num_steps", type=int, default=1000)
    parser.add_argument("--runs_dir", default="runs/compare")
    parser.add_argument("--out", default="docs/comparison.png")
    parser.add_argument("overrides", nargs="*", help="section.field=value, for every run")
    flags = parser.parse_args()
    with exit_on_input_error():
        rows = [
            run(flags, context, iterations)
            for iterations, context in itertools.product(ITERATIONS, CONTEXTS)
            if (context, iterations) != ("mean", 0)  # nothing would read the context
        ]
    print(table(rows))
    draw(rows, Path(flags.out))


def run(flags, context: str, iterations: int) -> dict:
    config = load_config(
        flags.config,
        [
            f"model.context={context}",
            f"model.num_iterations={iterations}",
            f"num_steps={flags.num_steps}",
            f"run_dir={flags.runs_dir}/{context}-{iterations}",
            "eval_every=100",
            "eval_sequences=0",
            "sample_every=0",
            *flags.overrides,
        ],
    )
    history = train(config).history
    per_update = (
        3
        * flops_per_token(config.model, config.data.seq_len)
        * config.batch_size
        * config.data.seq_len
    )
    seconds = sorted(r["seconds_per_step"] for r in history if "loss" in r)
    curve = [
        (r["step"], r["step"] * per_update, r["validation_bits_per_byte"])
        for r in history
        if "validation_loss" in r
    ]
    return {
        "name": f"{context}, T = {iterations}",
        "context": context,
        "iterations": iterations,
        "parameters": param_count(config.model),
        "flops": per_update,
        "curve": curve,
        "ms": 1000 * seconds[len(seconds) // 2],
    }


def table(rows: list[dict]) -> str:
    steps = [step for step, _, _ in rows[0]["curve"]]
    shown = [s for s in steps if s in {steps[0], steps[len(steps) // 2], steps[-1]} or s % 250 == 0]
    budget = min(row["curve"][-1][1] for row in rows)
    head = ["model", "parameters", "GFLOP per update", "ms per update"]
    head += [f"{s} updates" for s in shown] + [f"at {budget / 1e12:.0f} TFLOP"]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for row in rows:
        at = {step: bits for step, _, bits in row["curve"]}
        cells = [row["name"], f"{row['parameters']:,}", f"{row['flops'] / 1e9:.1f}"]
        cells += [f"{row['ms']:.0f}"] + [f"{at[s]:.3f}" for s in shown]
        cells += [f"{bits_at(row['curve'], budget):.3f}"]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def bits_at(curve, budget: float) -> float:
    """Validation bits per byte when `budget` FLOPs are spent, between the two nearest points."""
    for (_, f0, b0), (_, f1, b1) in itertools.pairwise(curve):
        if f0 <= budget <= f1:
            return b0 + (b1 - b0) * (budget - f0) / (f1 - f0)
    return curve[0][2] if budget < curve[0][1] else curve[-1][2]


def draw(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colour = dict(zip(CONTEXTS, ("tab:red", "tab:blue", "tab:green"), strict=True))
    style = dict(zip(ITERATIONS, (":", "--", "-"), strict=True))
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for row in rows:
        steps, flops, bits = zip(*row["curve"], strict=True)
        look = {"color": colour[row["context"]], "linestyle": style[row["iterations"]]}
        axes[0].plot(steps, bits, label=row["name"], **look)
        axes[1].plot([f / 1e12 for f in flops], bits, **look)
    axes[0].set(xlabel="updates", ylabel="validation bits per byte")
    axes[1].set(xlabel="training TFLOP", xscale="log")
    axes[0].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
