"""Draws the training and validation loss of a run: inl plot runs/tiny [OUT.png]."""

from collections.abc import Sequence

from inl_jax.config import InputError
from inl_jax.console import reason, say
from inl_jax.terminal import signals
from inl_jax.terminal.command_line import Parser


def main(argv: Sequence[str]) -> int:
    """The verb; returns the exit code."""
    parser = Parser("plot", __doc__)
    parser.add_path("run_dir")
    parser.add_path("out", nargs="?", help="the picture; RUN_DIR/loss.png by default")
    flags = parser.parse_flags(argv)
    try:
        import matplotlib
    except ImportError:
        raise InputError("inl plot needs matplotlib: pip install 'inl_jax[plot]'") from None
    from inl_jax.training.metrics import read_metrics

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    signals.unwind()
    out = flags.out or flags.run_dir / "loss.png"
    if out.is_dir() or not out.suffix:
        raise InputError(f"inl plot: {out} is no picture; name one, such as loss.png, and one run")
    records = read_metrics(flags.run_dir)
    if not records:
        raise InputError(f"{flags.run_dir}: no metrics.jsonl with records in it; name a run_dir")
    figure, axis = plt.subplots(figsize=(7, 4))
    for key, label, style in (("loss", "training", "-"), ("validation_loss", "validation", "o-")):
        found = [(r["step"], r[key]) for r in records if key in r]
        if found:
            axis.plot(*zip(*found, strict=True), style, label=label, markersize=4)
    axis.set(xlabel="updates", ylabel="loss (nats per token)", title=flags.run_dir.name)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    try:
        figure.savefig(out, dpi=110)
    except (OSError, ValueError) as error:  # ValueError: no picture has this suffix
        raise InputError(f"{out}: {reason(error)}; name another file, such as loss.png") from None
    plt.close(figure)
    say(f"loss picture: {out}")
    return 0
