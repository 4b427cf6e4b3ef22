"""The questions of `learning.py`: which models are trained, on what, how often.

A name says what an arm is: its mixer, T iterations, C the width of its controllers, F the width of
its feed-forward layer in widths of the model, and what else differs from the defaults.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from corpora import CORPORA
from study import UPDATES, Arm, Run

RATE = 5e-3  # peak learning rate, the best of RATES for all families (question "rate")
RATES = (3e-3, RATE, 8e-3)
RATE_256 = 3e-3  # the best of the first two at width 256 (question "width")
SEEDS = (0, 1, 2)


class Question(NamedTuple):
    """A question, and the runs that answer it."""

    text: str
    runs: Sequence[Run]


def arm(
    context: str, F: float, T: int = 0, C: int = 8, dt: float = 1.0, *, form: str = "", **fields
) -> Arm:
    """An arm by what its name says; `fields` are others of `model.`"""
    every = fields.get("attention_every")
    parts = [f"{context}+attention/{every}" if every else context]
    model = {"context": context, "d_ff": F, "num_iterations": T, **fields}
    if T:
        model |= {"controller_width": C, "dt": dt}
        parts += [f"T{T}", f"C{C}", f"dt{dt:g}"]
    parts.append(f"F{F:g}")
    parts += [f"{name}={value:g}" for name, value in fields.items() if name != "attention_every"]
    name = " ".join([*parts, form] if form else parts)
    return Arm(name, tuple((f"model.{field}", value) for field, value in model.items()), form)


def runs_of(
    arms: Iterable[Arm],
    *,
    width: int = 128,
    corpora: Sequence[str] = ("code",),
    rates: Sequence[float] = (RATE,),
    seeds: Sequence[int] = (0,),
    updates: int = UPDATES,
) -> list[Run]:
    """Every arm on every corpus, at every rate, with every seed."""
    every = itertools.product(seeds, corpora, rates, arms)
    return [Run(one, width, corpus, rate, seed, updates) for seed, corpus, rate, one in every]


QUARTER, HALF = {"attention_every": 4}, {"attention_every": 2}
DECAY, GATED, ATTENTION = (arm(context, 2) for context in ("decay", "gated", "attention"))
MIXED = arm("gated", 2, **QUARTER)
# Controllers of a sixteenth of the width: one iteration then costs as much as a feed-forward layer
# that is wider by 3/8 of the width.
EQUAL = 2 + 3 / 8
BEST, BEST_256 = arm("gated", 2, T=1, C=8), arm("gated", 2, T=1, C=16)
TWO = arm("gated", 2, T=2, dt=0.5)
# Controllers that read nothing cost no products: the feed-forward layer is as wide as without them.
CONSTANT = arm("gated", EQUAL, T=1, C=0)
WEAK = {"initial_beta": 0.02}
LONG = ("gated", {}), ("gated", QUARTER), ("attention", {})

QUESTIONS = {
    "rate": Question(
        "Which peak learning rate suits each family?",
        runs_of((DECAY, GATED, BEST, ATTENTION), rates=RATES),
    ),
    "mixers": Question(
        "Which mixer, without the integrator?",
        runs_of((GATED, ATTENTION), corpora=CORPORA, seeds=SEEDS)
        + runs_of([MIXED], corpora=("code", "prose"), seeds=SEEDS)
        + runs_of([DECAY], seeds=SEEDS),
    ),
    "integrator": Question(
        "What does the integrator add to each mixer at equal FLOPs?",
        runs_of((GATED, arm("gated", EQUAL), CONSTANT, BEST), corpora=CORPORA, seeds=SEEDS)
        + runs_of((ATTENTION, arm("attention", EQUAL), arm("attention", 2, T=1)), seeds=SEEDS)
        + runs_of((DECAY, arm("decay", EQUAL), arm("decay", 2, T=1)), seeds=SEEDS),
    ),
    "width": Question(
        "Does it hold at twice the width?",
        runs_of((arm("gated", EQUAL), BEST_256), width=256, rates=RATES[:2])
        + runs_of(
            (arm("gated", EQUAL), CONSTANT, BEST_256), width=256, rates=[RATE_256], seeds=SEEDS
        )
        + runs_of((GATED, DECAY, ATTENTION), width=256, rates=[RATE_256]),
    ),
    "longer": Question(
        "Does it hold with three and six times the text?",
        runs_of(
            [
                *(arm(mixer, EQUAL, **every) for mixer, every in LONG),
                *(arm(mixer, 2, T=1, **every) for mixer, every in LONG),
                arm("gated", EQUAL, T=1, C=0, **QUARTER),
                arm("gated", 2, T=1, **HALF),
            ],
            updates=6 * UPDATES,
            seeds=SEEDS,
        )
        + runs_of(
            [
                *(ATTENTION, arm("attention", 2, T=1)),
                arm("attention", 2, T=1, **WEAK),
                *(arm("gated", EQUAL), BEST),
                *(MIXED, arm("gated", 2, T=1, **QUARTER)),
            ],
            updates=3 * UPDATES,
        ),
    ),
    "cost": Question(
        "What do controllers of width C, T iterations and time steps dt gain for what they cost?",
        runs_of(
            [
                *(arm("gated", F) for F in (2, EQUAL, 4)),
                *(arm("gated", 2, T=1, C=C) for C in (0, 1, 4, 8, 16, 32, 64)),
                *(arm("gated", 2, T=1, dt=dt) for dt in (0.1, 0.3, 2)),
                *(arm("gated", 2, T=T, dt=round(1 / T, 2)) for T in (2, 3)),
                *(arm("gated", 2, T=T, dt=0.2) for T in (3, 5)),
                arm("gated", 2, T=3, C=64, dt=0.1),
            ]
        ),
    ),
    "pull": Question(
        "Is it what the controllers read, or the pull to mu?",
        runs_of(
            [
                *(arm("gated", F) for F in (2, EQUAL, 4, 8)),
                *(arm("gated", EQUAL, form=form) for form in ("small_logits", "small_embedding")),
                *(BEST, CONSTANT),
                *(arm("gated", 2, T=1, form=f) for f in ("small_logits", "small_embedding")),
                arm("gated", EQUAL, T=1, C=0, excitation_amplitude=0.0, form="scale"),
                arm("gated", EQUAL, T=1, C=0, **WEAK),
                arm("gated", 2, T=1, **WEAK),
                *(arm("gated", 2, T=3, dt=0.33, **start) for start in ({}, WEAK)),
                *(arm("gated", 2, T=15, dt=0.1, **start) for start in ({}, WEAK)),
                arm("gated", 2, T=15, dt=0.03),
                *(arm("decay", 2, T=15, dt=0.1, **start) for start in ({}, WEAK)),
            ]
        ),
    ),
    "layers": Question(
        "One integrator in each layer, one for all layers, or one in every other layer?",
        runs_of([GATED, BEST, *(arm("gated", 2, T=1, form=f) for f in ("shared", "every_other"))]),
    ),
    "alpha": Question(
        "Do alpha, the excitation and the published regularisers do anything?",
        runs_of(
            [
                TWO,
                *(arm("gated", 2, T=2, dt=0.5, kappa=kappa) for kappa in (128**0.5, math.inf)),
                arm("gated", 2, T=2, dt=0.5, excitation_amplitude=0.0),
                *(arm("gated", 2, T=2, dt=0.5, form=f) for f in ("mean", "speed", "energy")),
            ]
        ),
    ),
    "depth": Question(
        "What do fewer or more iterations at evaluation do, after a fixed and after a random T?",
        runs_of([TWO, arm("gated", 2, T=2, dt=0.5, form="random_depth")]),
    ),
}
DEPTHS = {run.arm.name: (1, 2, 3, 4) for run in QUESTIONS["depth"].runs}
