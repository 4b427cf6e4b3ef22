"""Draws the training and validation loss of a run: python scripts/plot.py runs/tiny [OUT.png]."""

import argparse
from pathlib import Path

import matplotlib

from inl_jax.cli.command_line import exit_on_input_error
from inl_jax.config import InputError
from inl_jax.training.metrics import read_metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir")
    parser.add_argument("out", nargs="?", help="RUN_DIR/loss.png by default")
    flags = parser.parse_args()
    out = Path(flags.out or Path(flags.run_dir) / "loss.png")
    with exit_on_input_error():
        records = read_metrics(flags.run_dir)
        if not records:
            raise InputError(f"{flags.run_dir}: no metrics.jsonl with records in it")
    figure, axis = plt.subplots(figsize=(7, 4))
    for key, label, style in (("loss", "training", "-"), ("validation_loss", "validation", "o-")):
        found = [(r["step"], r[key]) for r in records if key in r]
        if found:
            axis.plot(*zip(*found, strict=True), style, label=label, markersize=4)
    axis.set(xlabel="updates", ylabel="loss (nats per token)", title=Path(flags.run_dir).name)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    print(f"loss picture: {out}")


if __name__ == "__main__":
    main()
