"""What a report says about runs, section by section."""

import json
import math
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

import numpy as np

from inl_jax.console import plural
from inl_jax.report.charts import Figure, color_of, learning_figures, speed_figures
from inl_jax.report.dynamics_charts import dynamics_figures
from inl_jax.report.facts import (
    AIMS,
    UNKNOWN,
    Fact,
    architecture,
    best_evaluation,
    bytes_per_token,
    facts,
    number,
)
from inl_jax.report.page import figure_html, page
from inl_jax.report.run import Run

MAX_SAMPLES = 12  # updates of which a page shows samples


def report(runs: Sequence[Run]) -> str:
    """The report on one run or several, as a whole HTML page.

    Raises:
      InputError: plotly is not installed.
    """
    sections = [
        _header(runs[0]) if len(runs) == 1 else _comparison(runs),
        '<div id="controls"></div>',
        _charts("Learning", learning_figures(runs)),
        _aims(runs),
        _charts("Speed and memory", speed_figures(runs)),
        *(_charts(_of(run, runs, "Integrator"), dynamics_figures(run.records)) for run in runs),
        *(_samples(_of(run, runs, "Samples"), run) for run in runs),
        _differences(runs),
        "<h2>Config and environment</h2>",
        *(_fields(_of(run, runs, "Config"), run.config) for run in runs),
        *(_starts(run, runs) for run in runs),
        f"<footer>Made by <code>inl report</code>, {_day(time.time())}.</footer>",
    ]
    return page(", ".join(run.name for run in runs), "\n".join(sections))


def _of(run: Run, runs: Sequence[Run], title: str) -> str:
    return title if len(runs) == 1 else f"{title}: {run.name}"


def _header(run: Run) -> str:
    """The name of a run and its numbers as tiles."""
    tiles = "".join(
        f'<div class="tile"><dt>{fact.label}</dt>'
        f'<dd class="value {_tone(fact)}">{escape(fact.value)}</dd>'
        f'<dd class="more">{escape(fact.more)}</dd></div>'
        for fact in facts(run)
    )
    return (
        f'<header><h1>{escape(run.name)}</h1><p class="soft">{escape(_about(run))}</p></header>'
        f'<dl class="tiles">{tiles}</dl>'
    )


def _comparison(runs: Sequence[Run]) -> str:
    """The names of several runs and their numbers as a table, a column for each."""
    names = "".join(
        f'<th><span class="swatch" style="background:{color_of(i)}"></span>{escape(run.name)}</th>'
        for i, run in enumerate(runs)
    )
    abouts = "".join(f'<td class="soft">{escape(_about(run))}</td>' for run in runs)
    rows = "".join(
        f"<tr><th>{of_runs[0].label}</th>"
        + "".join(
            f'<td><span class="{_tone(fact)}">{escape(fact.value)}</span>'
            f'<div class="soft">{escape(fact.more)}</div></td>'
            for fact in of_runs
        )
        + "</tr>"
        for of_runs in zip(*map(facts, runs), strict=True)
    )
    return (
        f"<header><h1>{plural(len(runs), 'run')} compared</h1></header>"
        f'<div class="scroll"><table><tr><th></th>{names}</tr><tr><th>Run</th>{abouts}</tr>{rows}'
        "</table></div>"
    )


def _tone(fact: Fact) -> str:
    return "unknown" if fact.value == UNKNOWN else fact.tone


def _about(run: Run) -> str:
    times = run.curve("time")[1]
    when = f", {_day(times[0])} to {_day(times[-1])}" if len(times) else ""
    damaged = f"; damaged and left out: {', '.join(run.damaged)}" if run.damaged else ""
    return f"{architecture(run)}{when}{damaged}"


def _day(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def _charts(title: str, figures: Sequence[Figure]) -> str:
    if not figures:
        return ""
    drawn = "\n".join(map(figure_html, figures))
    return f'<section><h2>{escape(title)}</h2><div class="charts">{drawn}</div></section>'


def _aims(runs: Sequence[Run]) -> str:
    """The guide's perplexities beside what was reached, also per byte of text."""
    columns = []
    for run in runs:
        best, text = best_evaluation(run), bytes_per_token(run)
        if best and text:
            columns.append(
                [
                    run.name,
                    number(best.get("validation_perplexity"), ",.2f"),
                    f"{best['validation_bits_per_byte']:.3f}",
                    f"{text:.2f}",
                    *(f"{math.log2(aim) / text:.3f}" for aim in AIMS.values()),
                ]
            )
    if not columns:
        return ""
    names = [
        "",
        "best perplexity",
        "the same in bits per byte",
        "bytes per token",
        *(f"aim for {what}, perplexity {aim}, in bits per byte" for what, aim in AIMS.items()),
    ]
    head, *rows = zip(names, *columns, strict=True)
    return (
        "<section><h2>The guide's aims</h2><p>The training guide aims at a perplexity below "
        f"{AIMS['text']} for text and below {AIMS['code']} for code. Perplexity is counted per "
        "token, so it depends on the tokenizer: shorter tokens are easier to predict. Bits per "
        "byte can be compared between tokenizers; the aims are given in them too, with the "
        f"tokenizer of the run.</p>{_table(rows, head)}</section>"
    )


def _samples(title: str, run: Run) -> str:
    """What the model wrote, by prompt and update."""
    records = [record for record in run.records if record.get("samples")]
    if not records:
        return ""
    shown = np.unique(np.linspace(0, len(records) - 1, min(len(records), MAX_SAMPLES)).astype(int))
    prompts: dict[str, list[str]] = {}
    for record in (records[i] for i in shown):
        for sample in record["samples"]:
            texts = "".join(
                f'<div><div class="soft kind">{kind}</div><p class="text"><span class="prompt">'
                f"{escape(sample['prompt'])}</span>{escape(sample[kind])}</p></div>"
                for kind in ("greedy", "sampled")
            )
            step = f'<div class="step">update {record["step"]:,}</div>'
            rows = prompts.setdefault(sample["prompt"], [])
            rows.append(f'<div class="sample">{step}{texts}</div>')
    note = f" {len(shown)} of {len(records)} are shown." if len(shown) < len(records) else ""
    return (
        f"<section><h2>{escape(title)}</h2><p class='soft'>Continuations by the likeliest tokens "
        f"(greedy) and by tokens drawn with the same seed each time (sampled).{note}</p>"
        + "".join(
            f"<details open><summary><code>{escape(prompt)}</code></summary>"
            f'<div class="samples">{"".join(rows)}</div></details>'
            for prompt, rows in prompts.items()
        )
        + "</section>"
    )


def _differences(runs: Sequence[Run]) -> str:
    """The fields of the configs that are not the same in all runs."""
    if len(runs) == 1:
        return ""
    configs = [dict(_flat(run.config)) for run in runs]
    names = dict.fromkeys(name for config in configs for name in config)
    rows = [[name, *(config.get(name, "absent") for config in configs)] for name in names]
    rows = [row for row in rows if len(set(row[1:])) > 1 and row[0] != "run_dir"]
    table = _table(rows, ["field", *(run.name for run in runs)])
    same = "<p>Nothing: the configs are the same.</p>"
    return f"<section><h2>What differs</h2>{table if rows else same}</section>"


def _fields(title: str, values: dict[str, Any]) -> str:
    """A nested dictionary, folded away."""
    if not values:
        return ""
    table = _table([[name, value] for name, value in _flat(values)])
    return f"<details><summary>{escape(title)}</summary>{table}</details>"


def _starts(run: Run, runs: Sequence[Run]) -> str:
    """Where the run was started: the last start in full, the others as a line each."""
    starts = run.environment.get("starts", [])
    if not starts:
        return ""
    title = _of(run, runs, "Environment")
    if len(starts) == 1:
        return _fields(title, starts[0])
    rows = [
        [s["time"], s["host"], f"{s['devices']['count']} x {s['devices']['kind']}", s["command"]]
        for s in starts
    ]
    table = _table(rows, ["start", "host", "devices", "command"])
    return (
        f"<details><summary>{escape(title)}: {len(starts)} starts</summary>{table}</details>"
        + _fields(f"{title}: last start", starts[-1])
    )


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)


def _table(rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    """Plain text as an HTML table whose first column names the rows."""
    top = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>" if head else ""
    body = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for name, *cells in rows
    )
    return f'<div class="scroll"><table>{top}{body}</table></div>'
