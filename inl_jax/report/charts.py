"""Records of runs as charts: plain dictionaries that plotly.js draws."""

import html
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from inl_jax.report.run import Run

# Legible on white and on near black. The runs of a page take them in turn.
COLORS = ("#3b7dd8", "#e0683c", "#2a9d6f", "#b055c4", "#c2951a", "#d6467e", "#3aa6b9", "#7d6bd0")
DASHES = ("solid", "dash", "dot", "dashdot")
GRAY = "#8a8f98"  # of lines that mark a value
MAX_POINTS = 2000  # of one curve


class Figure(NamedTuple):
    """One chart. `page.figure_html` makes it part of a page."""

    title: str
    caption: str
    data: list[dict[str, Any]]
    """Traces of plotly.js. `meta.x`, {"updates": [...], "tokens": [...], "hours": [...]}, gives the
    horizontal positions that a reader may choose among. If the reader asks for smooth curves,
    traces with `meta.role` "raw" fade and those with "smooth" appear."""
    layout: dict[str, Any]
    """Layout of plotly.js. The page sets fonts, margins and the colours of the theme; `meta.log`
    offers a logarithmic vertical axis, and `height`, in pixels, is 300 by default."""


class _Chart(NamedTuple):
    title: str
    caption: str
    key: str  # of a record
    unit: str
    scale: float = 1.0  # from the record to `unit`
    beside: str = ""  # a second key, drawn dashed
    names: tuple[str, str] = ("", "")  # of the two
    above: float = -np.inf  # runs whose values never exceed this are left out
    markers: bool = False
    star: bool = False  # on the lowest value
    smooth: bool = False  # offers a moving average
    axis: Literal["linear", "linear or log", "log or linear"] = "linear"
    shape: Literal["linear", "hv"] = "linear"  # hv: steps
    from_zero: bool = False
    whole: bool = False  # a count
    bounds: tuple[tuple[float, str], ...] = ()  # a lower and an upper line and what they mean


_LEARNING = (
    _Chart(
        title="Training loss",
        caption="Of single updates.",
        key="loss",
        unit="nats per token",
        smooth=True,
        axis="linear or log",
    ),
    _Chart(
        title="Validation loss",
        caption="A star marks the lowest. Dashed: mean training loss since the evaluation before.",
        key="validation_loss",
        unit="nats per token",
        beside="train_loss",
        names=("validation", "training"),
        markers=True,
        star=True,
        axis="linear or log",
    ),
    _Chart(
        title="Bits per byte",
        caption="The validation loss per byte of text, comparable between tokenizers.",
        key="validation_bits_per_byte",
        unit="bits per byte",
        markers=True,
        star=True,
        axis="linear or log",
    ),
    _Chart(
        title="Gap",
        caption="Validation loss less training loss.",
        key="gap",
        unit="nats per token",
        markers=True,
        bounds=((0.5, "good below"), (1.0, "over-fitting above")),
    ),
    _Chart(
        title="Learning rate",
        caption="",
        key="learning_rate",
        unit="",
        from_zero=True,
        axis="linear or log",
    ),
    _Chart(
        title="Gradient norm",
        caption="Before clipping.",
        key="grad_norm",
        unit="",
        smooth=True,
        axis="log or linear",
    ),
    _Chart(
        title="Skipped updates",
        caption="Updates so far whose loss or gradient was not finite. They changed nothing.",
        key="skipped",
        unit="updates",
        above=0,
        shape="hv",
        whole=True,
    ),
)
_SPEED = (
    _Chart(
        title="Throughput",
        caption="",
        key="tokens_per_second",
        unit="tokens per second",
        from_zero=True,
    ),
    _Chart(
        title="MFU",
        caption="The model's FLOP/s as a share of the devices' peak.",
        key="mfu",
        unit="%",
        scale=100,
        from_zero=True,
    ),
    _Chart(
        title="Waiting for data",
        caption="Share of the time that the host waited for input.",
        key="input_wait",
        unit="%",
        scale=100,
        above=0.01,
    ),
    _Chart(
        title="Memory of a device",
        caption="JAX's highest use so far. Dashed: what the driver counts, JAX's reserve included.",
        key="peak_memory",
        unit="GiB",
        scale=2**-30,
        beside="gpu_memory",
        names=("JAX", "driver"),
        from_zero=True,
    ),
    _Chart(
        title="GPU utilisation", caption="", key="gpu_util", unit="%", scale=100, from_zero=True
    ),
    _Chart(title="GPU temperature", caption="", key="gpu_temperature", unit="°C"),
    _Chart(
        title="GPU power",
        caption="Of all GPUs of process 0.",
        key="gpu_watts",
        unit="watts",
        from_zero=True,
    ),
)


def color_of(index: int) -> str:
    """The colour of run number `index` on all charts of a page."""
    return COLORS[index % len(COLORS)]


def learning_figures(runs: Sequence[Run]) -> list[Figure]:
    """What was learned and what steered it. A chart without values is left out."""
    return [*_figures(_LEARNING, runs), *_by_source(runs)]


def speed_figures(runs: Sequence[Run]) -> list[Figure]:
    """Throughput, memory and the GPUs. A chart without values is left out."""
    return _figures(_SPEED, runs)


def thinned(values: np.ndarray) -> np.ndarray:
    """Indices of at most about `MAX_POINTS` of `values`, in order.

    The first and the last stay, and the lowest and the highest of every stretch between them.
    """
    if len(values) <= MAX_POINTS:
        return np.arange(len(values))
    kept = [0, len(values) - 1]
    for stretch in np.array_split(np.arange(len(values)), MAX_POINTS // 2):
        finite = stretch[np.isfinite(values[stretch])]
        if len(finite):
            kept += [finite[values[finite].argmin()], finite[values[finite].argmax()]]
        else:  # a gap stays a gap
            kept.append(stretch[0])
    return np.unique(kept)


def moving_average(values: np.ndarray) -> np.ndarray:
    """Exponential average over about 2% of the values, at least 5. Skips what is not finite."""
    decay = 1 - 1 / max(5, 0.02 * len(values))
    total = weight = 0.0
    averages = np.full(len(values), np.nan)
    for i, value in enumerate(values):
        if np.isfinite(value):
            total, weight = decay * total + value, decay * weight + 1
            averages[i] = total / weight
    return averages


def _figures(charts: Sequence[_Chart], runs: Sequence[Run]) -> list[Figure]:
    figures = []
    for chart in charts:
        name, beside_name = chart.names
        traces = []
        for i, run in enumerate(runs):
            steps, values = run.curve(chart.key)
            alone = len(runs) == 1
            if np.nanmax(values, initial=-np.inf) > chart.above:
                traces += _traces(
                    chart, run, color_of(i), steps, values, name=name if alone else run.name
                )
            if chart.beside:
                steps, values = run.curve(chart.beside)
                beside = beside_name if alone else f"{run.name}, {beside_name}"
                traces += _traces(chart, run, color_of(i), steps, values, name=beside, dash="dash")
        if traces:
            figures.append(_figure(chart, traces))
    return figures


def _by_source(runs: Sequence[Run]) -> list[Figure]:
    """The validation loss of each source. With several runs a source is a dash of their colour."""
    chart = _Chart(
        title="Validation loss by source",
        caption="",
        key="sources",
        unit="nats per token",
        markers=True,
        axis="linear or log",
    )
    traces = []
    for i, run in enumerate(runs):
        records = [record for record in run.records if chart.key in record]
        for j, name in enumerate(records[-1][chart.key] if records else ()):
            found = [
                (r["step"], r[chart.key][name]["loss"]) for r in records if name in r[chart.key]
            ]
            steps, losses = zip(*found, strict=True)
            alone = len(runs) == 1
            traces += _traces(
                chart,
                run,
                color_of(j if alone else i),
                np.array(steps),
                np.array(losses, float),
                name=name if alone else f"{run.name}, {name}",
                dash="solid" if alone else DASHES[j % len(DASHES)],
            )
    return [_figure(chart, traces)] if traces else []


def _traces(
    chart: _Chart,
    run: Run,
    color: str,
    steps: np.ndarray,
    values: np.ndarray,
    *,
    name: str,
    dash: str = "solid",
) -> list[dict[str, Any]]:
    """A curve and, if the chart offers it, its moving average; nothing without finite values."""
    if not np.isfinite(values).any():
        return []
    values = values * chart.scale
    kept = thinned(values)
    points = {axis: [_short(x) for x in at[kept]] for axis, at in run.positions(steps).items()}
    trace = {
        "type": "scatter",
        "mode": "lines+markers" if chart.markers or len(kept) == 1 else "lines",
        "name": html.escape(name or run.name),
        "y": [_short(y) for y in values[kept]],
        "line": {
            "color": color,
            "width": 1.6,
            "dash": dash,
            "shape": chart.shape,
        },
        "cliponaxis": False,
        "marker": {"size": 5, "line": {"width": 0}},
        "meta": {"x": points, "records": len(values), "role": "raw" if chart.smooth else "plain"},
    }
    if chart.star and dash == "solid":
        lowest = kept == np.nanargmin(values)
        trace["marker"] |= {
            "symbol": ["star" if low else "circle" for low in lowest],
            "size": [13 if low else 5 for low in lowest],
        }
    if not chart.smooth:
        return [trace]
    trace["legendgroup"] = run.name  # one click hides both
    return [
        trace,
        trace
        | {
            "name": f"{trace['name']}, smooth",
            "mode": "lines",
            "y": [_short(y) for y in moving_average(values)[kept]],
            "line": {"color": color, "width": 2.4},
            "showlegend": False,
            "meta": trace["meta"] | {"role": "smooth"},
        },
    ]


def _figure(chart: _Chart, traces: list[dict[str, Any]]) -> Figure:
    records = max(trace["meta"]["records"] for trace in traces)
    drawn = f"Of {records:,} records the extremes of each stretch are drawn."
    caption = f"{chart.caption} {drawn if records > MAX_POINTS else ''}".strip()
    ends = zip(chart.bounds, ("start", "end"), ("bottom", "top"), strict=False)
    highest = max(y for trace in traces for y in trace["y"] if np.isfinite(y))
    layout = {
        "showlegend": len({trace["name"] for trace in traces if "showlegend" not in trace}) > 1,
        "yaxis": {
            "title": {"text": chart.unit, "standoff": 8},
            "type": "log" if chart.axis == "log or linear" else "linear",
            "hoverformat": ".5~g",
            "rangemode": "tozero" if chart.from_zero else "normal",
            **({"dtick": 1} if chart.whole and highest <= 5 else {}),
        },
        # Both labels stand between the lines, at opposite ends: neither is cut off.
        "shapes": [marked(value, f"{what} {value}", *at) for (value, what), *at in ends],
        "meta": {"log": chart.axis != "linear"},
    }
    return Figure(chart.title, caption, traces, layout)


def marked(value: float, text: str, position: str, anchor: str) -> dict[str, Any]:
    """A dotted line across a chart at a height, and what it means; plotly.js places the text."""
    return {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "y0": value,
        "y1": value,
        "line": {"color": GRAY, "width": 1, "dash": "dot"},
        "label": {
            "text": text,
            "textposition": position,
            "yanchor": anchor,
            "font": {"color": GRAY},
        },
    }


def _short(value: float) -> float | int:
    """Six significant digits; updates and tokens stay whole."""
    return int(value) if isinstance(value, np.integer) else float(f"{value:.6g}")
