"""Does the integrator earn its cost, and which mixer should read the earlier positions?

python benchmarks/learning.py [--questions rate mixers ...] [--runs_dir runs/learning]
    [--out docs/learning.png] [--read_only]

Trains the models of each question from scratch on text that any machine has, and prints a table of
the bits per byte of the whole validation split: the mean over seeds, and their spread. Each CPU
trains one run at a time; a GPU, all. Runs that have ended are read, so the command can be stopped
and repeated.

All runs of as many updates read the same tokens. `beside T 0` compares with the same mixer without
the integrator at the same training FLOPs: between the two nearest widths of its feed-forward layer,
linearly in the logarithm of the FLOPs.
"""

import itertools
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from corpora import CORPORA, sources
from harness import machine, make_parser, markdown
from questions import DEPTHS, QUESTIONS
from study import ROWS, SEQ_LEN, Run, read_result, train_runs

from inl_jax.terminal.command_line import exit_on_input_error

COLOURS = {
    "decay": "tab:blue",
    "gated": "tab:red",
    "gated+attention/4": "tab:purple",
    "attention": "tab:green",
}
LOOKS = {"without integrator": "o-", "controllers that read nothing": "s", "one iteration": "^"}


class Found(NamedTuple):
    """What the seeds of an arm found on a corpus, at one learning rate."""

    name: str
    width: int
    corpus: str
    learning_rate: float
    updates: int
    bits: list[float]  # per byte, by seed
    parameters: int
    flops: float  # of the training
    losses: list[float]  # of the training of the first seed, over 20ths of the run
    by_depth: dict[str, float]  # bits per byte of the first seed, by iterations at evaluation

    @property
    def mean(self) -> float:
        """Mean bits per byte."""
        return statistics.mean(self.bits)

    @property
    def spread(self) -> float:
        """Half of the distance between the best and the worst seed, in bits per byte."""
        return (max(self.bits) - min(self.bits)) / 2

    @property
    def mixer(self) -> str:
        """The first word of the name."""
        return self.name.split()[0]

    @property
    def has_integrator(self) -> bool:
        """Whether the name has a T."""
        return " T" in self.name


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("learning", __doc__)
    parser.add_argument("--questions", nargs="+", default=list(QUESTIONS), choices=QUESTIONS)
    parser.add_argument("--runs_dir", default="runs/learning", help="of results and corpora")
    parser.add_argument("--out", default="docs/learning.png", help="the picture")
    parser.add_argument("--read_only", action="store_true", help="train nothing")
    parser.add_argument("-h", "--help", action="help", help="show this")
    with exit_on_input_error():
        flags = parser.parse_flags(sys.argv[1:] if argv is None else argv)
        questions = {name: QUESTIONS[name] for name in flags.questions}
        runs = [run for question in questions.values() for run in question.runs]
        if not flags.read_only:
            train_runs(runs, flags.runs_dir, depths=DEPTHS)
    everything = find(itertools.chain(*(q.runs for q in QUESTIONS.values())), flags.runs_dir)
    print(f"{machine()}; prose from {sources()}")
    for name, question in questions.items():
        print(f"\n### {name}: {question.text}\n")
        rows = table_rows(find(question.runs, flags.runs_dir), everything)
        print(markdown(rows) if rows else "No run of it has ended.")
    if everything:
        draw(everything, Path(flags.out))


def find(runs: Iterable[Run], runs_dir: str) -> list[Found]:
    """The results of runs that have ended, by arm, width, corpus and learning rate."""
    grouped: dict[Run, list] = {}
    for run in dict.fromkeys(runs):
        if result := read_result(run, runs_dir):
            grouped.setdefault(run._replace(seed=0), []).append(result)
    return [
        Found(
            *(run.arm.name, run.width, run.corpus, run.learning_rate, run.updates),
            [result.bits_per_byte for result in results],
            *(results[0].parameters, results[0].flops),
            *(results[0].losses, results[0].by_depth),
        )
        for run, results in grouped.items()
    ]


def without_integrator(found: Found, everything: Sequence[Found]) -> float | None:
    """Bits per byte of the same mixer without the integrator, at the FLOPs of `found`.

    None if no width of the feed-forward layer costs the same, and no two lie on both sides.
    """
    same = (found.mixer, found.width, found.corpus, found.learning_rate, found.updates)
    curve = sorted(
        (math.log(one.flops), one.mean)
        for one in everything
        if (one.mixer, one.width, one.corpus, one.learning_rate, one.updates) == same
        and not one.has_integrator
        and len(one.name.split()) == 2
    )
    at = math.log(found.flops)
    if at in dict(curve):
        return dict(curve)[at]
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x0 <= at <= x1:
            return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return None


def table_rows(found: Sequence[Found], everything: Sequence[Found]) -> list[dict[str, str]]:
    """A row for each arm, width and learning rate, with a column for each corpus."""
    rows: dict[tuple, dict[str, str]] = {}
    in_all = set.intersection(*(set(one.by_depth) for one in found)) if found else set()
    depths = sorted(map(int, in_all))
    for one in found:
        key = one.name, one.width, one.learning_rate, one.updates
        row = rows.setdefault(key, _head(one) | dict.fromkeys(_columns(found, depths), ""))
        spread = f" ± {one.spread:.4f}" if len(one.bits) > 1 else ""
        row[one.corpus] = f"{one.mean:.4f}{spread}"
        base = without_integrator(one, everything)
        if one.has_integrator and base:
            row[f"beside T 0, {one.corpus}"] = f"{100 * (one.mean / base - 1):+.2f}%"
        row |= {f"{t} iterations": f"{one.by_depth[str(t)]:.4f}" for t in depths}
    return [{name: cell or "-" for name, cell in row.items()} for row in rows.values()]


def _head(one: Found) -> dict[str, str]:
    return {
        "model": one.name,
        "width": str(one.width),
        "rate": f"{one.learning_rate:g}",
        "updates": f"{one.updates:,}",
        "parameters": f"{one.parameters:,}",
        "TFLOP": f"{one.flops / 1e12:.2f}",
        "seeds": str(len(one.bits)),
    }


def _columns(found: Sequence[Found], depths: Sequence[int]) -> list[str]:
    corpora = [name for name in CORPORA if any(one.corpus == name for one in found)]
    with_integrator = {one.corpus for one in found if one.has_integrator}
    beside = [f"beside T 0, {name}" for name in corpora if name in with_integrator]
    return [*corpora, *beside, *(f"{t} iterations" for t in depths)]


def draw(everything: Sequence[Found], path: Path) -> None:
    """Draws bits per byte against training FLOPs for each corpus, and the longest runs' losses.

    Args:
      everything: models; those of the least width are drawn, and of the shortest runs those with
        several seeds.
      path: of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    width = min(one.width for one in everything)
    drawn = [one for one in everything if one.width == width and one.mixer in COLOURS]
    shortest, longest = (f(one.updates for one in drawn) for f in (min, max))
    figure, axes = plt.subplots(1, len(CORPORA) + 1, figsize=(17, 4.4))
    for corpus, axis in zip(CORPORA, axes[:-1], strict=True):
        for (mixer, look), points in _by_look(
            one
            for one in drawn
            if (one.updates, one.corpus) == (shortest, corpus) and len(one.bits) > 1
        ).items():
            axis.errorbar(
                [one.flops / 1e12 for one in points],
                [one.mean for one in points],
                yerr=[one.spread for one in points],
                fmt=LOOKS[look],
                color=COLOURS[mixer],
                capsize=3,
                label=f"{mixer}, {look}",
            )
        axis.set(title=f"{corpus}, {_tokens(shortest):.0f}M tokens", xlabel="training TFLOP")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation bits per byte")
    axes[0].legend(fontsize=7)
    for one in drawn:
        if (one.updates, one.corpus) == (longest, "code"):
            parts = len(one.losses)
            tokens = [_tokens(longest) * (i + 0.5) / parts for i in range(parts)]
            style = ":" if one.has_integrator else "-"
            axes[-1].plot(tokens, one.losses, style, color=COLOURS[one.mixer], label=one.name)
    axes[-1].set(title="code, in training", xlabel="million tokens", ylabel="loss, nats per token")
    axes[-1].set_ylim(top=4)
    axes[-1].legend(fontsize=7)
    axes[-1].grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _by_look(found: Iterable[Found]) -> dict[tuple[str, str], list[Found]]:
    """Models by their mixer and their key in `LOOKS`, by FLOPs."""
    grouped: dict[tuple[str, str], list[Found]] = {}
    for one in sorted(found, key=lambda one: one.flops):
        controlled = "controllers that read nothing" if " C0 " in one.name else "one iteration"
        look = controlled if one.has_integrator else "without integrator"
        grouped.setdefault((one.mixer, look), []).append(one)
    return grouped


def _tokens(updates: int) -> float:
    """Millions of tokens that so many updates read."""
    return updates * ROWS * SEQ_LEN / 1e6


if __name__ == "__main__":
    main()
