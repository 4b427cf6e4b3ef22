"""What the integrator does, as charts: layer by iteration, over the updates of a run, by token.

A quantity has one name, one colour and one meaning on every page.
"""

import html
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from inl_jax.report.charts import GRAY, Figure, marked
from inl_jax.training.metrics import Record

Dynamics = dict[str, list[list[float | None]]]  # of a record: [L][T] under each name


class Look(NamedTuple):
    """How one of the measured quantities is shown."""

    title: str
    meaning: str
    colors: str
    """From the lowest value to the highest, with spaces between."""
    limits: tuple[float, float] | None = None
    """The values of the end colours; None: the lowest and the highest found."""


LOOKS = {
    "rms_error": Look(
        "Distance to the equilibrium",
        "rms(x - mu) after the iteration: how far the state still is from the learned mu. "
        "A normalised vector has rms 1.",
        "#e8f0f8 #9cc3e6 #4a8fd0 #1f5a9e #0f2f5c",
    ),
    "rms_step": Look(
        "Movement",
        "rms(x' - x): how far the iteration moved the state. It falls as the layer converges.",
        "#fbeee2 #f5c396 #e58a4e #b85420 #6b2b0c",
    ),
    "alpha": Look(
        "Memory alpha",
        "The share of the velocity that an iteration keeps, from 0 to 1. The candidate gives the "
        "rest.",
        "#f1ebf8 #cdb6e6 #9d78cc #6b449f #3a1f63",
    ),
    "beta": Look(
        "Pull beta",
        "The strength of the pull back to mu, acceleration per distance; at most 2 / dt.",
        "#e4f4ee #9fd8c1 #4eae8c #1f7a5c #0c4433",
    ),
    "gate": Look(
        "Gate",
        "The share of the velocity that moves the state, from 0 (it stands still) to 1.",
        "#f8f2dd #e6d08a #c2a03c #8a6c18 #4c3a08",
    ),
    "stiffness": Look(
        "Stiffness",
        "dt gate beta, the largest of all channels and tokens: a step is stable below "
        "2 (1 + alpha), and slow far below it.",
        "#fae9ef #eeb0c4 #d86a90 #a3305b #5c1030",
    ),
    "cosine": Look(
        "Direction",
        "The cosine between a step and the one before: 1 goes straight on, 0 turns off, -1 swings "
        "back. The first step has none.",
        "#b5543a #dfa08c #f1efec #8fb2dd #2c62ab",
        limits=(-1, 1),
    ),
}
_LAYER_COLORS = ("#2fa6a0", "#3b7dd8", "#7a5fd0", "#b055c4", "#d6467e")  # first layer to last
_FEW_LAYERS = 8  # more of them have no legend, and thinner curves


def dynamics_figures(records: Sequence[Record]) -> list[Figure]:
    """Charts of the records that hold "dynamics": the last one by iteration, and all over updates.

    Without such a record there are none.
    """
    found = [record for record in records if record.get("dynamics")]
    if not found:
        return []
    last = found[-1]
    maps, curves = iteration_figures(last["dynamics"], when=f"At update {last['step']}. ")
    return [*maps, *curves, *(_update_figures(found) if len(found) > 1 else [])]


def looks_after(num_iterations: int) -> dict[str, Look]:
    """The looks of the quantities that so many iterations have: one has no step before it."""
    return {name: look for name, look in LOOKS.items() if num_iterations > 1 or name != "cosine"}


def iteration_figures(dynamics: Dynamics, *, when: str = "") -> tuple[list[Figure], list[Figure]]:
    """Maps of layers by iterations, one for each quantity; and curves, by iteration and stability.

    With a single iteration there is no curve by iteration.

    Args:
      dynamics: as `measure_dynamics` gives it.
      when: begins each caption.
    """
    L, T = len(dynamics["alpha"]), len(dynamics["alpha"][0])
    maps = [
        _map(
            name,
            dynamics[name],
            title=look.title,
            caption=when + look.meaning,
            x=range(1, T + 1),
            x_axis={"title": {"text": "iteration"}, **_whole_ticks(T)},
            hover="layer %{y}, iteration %{x}",
            labelled=L <= 12 and T <= 5,
        )
        for name, look in looks_after(T).items()
    ]
    convergence = [_convergence(dynamics, when)] if T > 1 else []
    return maps, [*convergence, _stability(dynamics, when)]


def token_figures(watched_LTS: dict[str, np.ndarray], labels: Sequence[str]) -> list[Figure]:
    """Maps of layers by the tokens of one text.

    Args:
      watched_LTS: as `watch_tokens` gives it, of one row: [L, T, S].
      labels: what each of the S tokens says, in visible letters.
    """
    L, S, letters = len(watched_LTS["alpha"]), len(labels), 14
    cut = [text if len(text) <= letters else text[: letters - 1] + "…" for text in labels]
    shown = [html.escape(text, quote=False) for text in cut]  # plotly.js reads some HTML
    fields = {
        "x": range(1, S + 1),
        "x_axis": {
            "tickvals": list(range(1, S + 1)),
            "ticktext": shown,
            "tickangle": -90,
            "tickfont": {"family": "ui-monospace, Menlo, Consolas, monospace", "size": 11},
        },
        "label_height": 7 * max(map(len, cut)),
        "hover": "layer %{y}, token %{x}: %{text}",
        "text": [shown] * L,
    }
    return [
        _map(
            "rms_error",
            watched_LTS["rms_error"][:, -1],
            title="What remains, token by token",
            caption="rms(x - mu) after the last iteration of each layer.",
            **fields,
        ),
        _map(
            "rms_step",
            watched_LTS["rms_step"].sum(axis=1),
            title="The way gone, token by token",
            caption="The movement rms(x' - x), added up over the iterations of each layer.",
            **fields,
        ),
    ]


def _update_figures(records: Sequence[Record]) -> list[Figure]:
    """How the integrator changed over the run, layer by layer."""
    steps, L = [r["step"] for r in records], len(records[-1]["dynamics"]["alpha"])

    def over_updates(name: str, **words: str) -> Figure:
        last_LN = np.array([_numbers(r["dynamics"][name])[:, -1] for r in records]).T
        # A category for each evaluation: the ticks are evaluations.
        axis = {"title": {"text": "updates"}, "type": "category", "nticks": 8}
        hover = "layer %{y}, update %{x}"
        return _map(name, last_LN, x=steps, x_axis=axis, hover=hover, **words)

    stiffest_NL = [_numbers(r["dynamics"]["stiffness"]).max(axis=1) for r in records]
    curves = [
        _layer_curve(i, L, steps, stiffness_N, "update %{x}: <b>%{y:.4~g}</b>")
        for i, stiffness_N in enumerate(np.array(stiffest_NL).T)
    ]
    return [
        over_updates(
            "rms_step",
            title="Movement of the last iteration, over updates",
            caption="rms(x' - x) in the last iteration: how far a layer is from having converged.",
        ),
        over_updates(
            "rms_error",
            title="Distance to the equilibrium, over updates",
            caption="rms(x - mu) after the last iteration.",
        ),
        Figure(
            "Stiffness over updates",
            "The largest dt gate beta of any iteration, from the first layer (teal) to the last "
            "(pink). The limit of stability is 2 (1 + alpha), which is never below 2.",
            curves,
            _curve_layout(L, {"title": {"text": "updates"}}, "dt gate beta")
            | {"shapes": [marked(2, "stable below 2", "start", "top")], "meta": {"log": True}},
        ),
    ]


def _map(
    name: str,
    values: Any,
    *,
    title: str,
    caption: str,
    x: Sequence[int],
    x_axis: dict[str, Any],
    hover: str,
    label_height: int = 0,
    labelled: bool = False,
    **fields: Any,
) -> Figure:
    """A map of `values`, a row for each layer, in the colours of a look.

    `hover` is a template of plotly.js, `label_height` is in pixels, and `labelled` writes the
    values on the cells.
    """
    colors, limits, L = LOOKS[name].colors.split(), LOOKS[name].limits, len(values)
    trace = {
        "type": "heatmap",
        "z": [_short(row) for row in values],
        "x": list(x),
        "y": list(range(1, L + 1)),
        "colorscale": [[i / (len(colors) - 1), color] for i, color in enumerate(colors)],
        "xgap": 1,
        "ygap": 1,
        "hoverongaps": False,
        "hovertemplate": f"{hover}<br><b>%{{z:.5~g}}</b><extra></extra>",
        "colorbar": {"thickness": 9, "outlinewidth": 0, "nticks": 5, "tickfont": {"size": 11}},
        **({"zmin": limits[0], "zmax": limits[1]} if limits else {}),
        **fields,
    }
    bare = {"showgrid": False, "zeroline": False}
    layout = {
        "height": min(max(60 + 34 * L, 200), 420) + label_height,
        "hovermode": "closest",
        "xaxis": bare | x_axis,
        "yaxis": {"title": {"text": "layer"}, "autorange": "reversed", **bare, **_whole_ticks(L)},
        "annotations": _cell_labels(trace["z"], colors, limits) if labelled else [],
    }
    return Figure(title, caption, [trace], layout)


def _cell_labels(
    rows: list[list[float | None]], colors: list[str], limits: tuple[float, float] | None
) -> list[dict[str, Any]]:
    """The values of a map of layers by iterations, black or white, whichever is easier to read."""
    values = _numbers(rows)
    low, high = limits or (np.nanmin(values), np.nanmax(values))
    size = 12 if values.shape[1] <= 3 else 10
    shares = (values - low) / (high - low) if high > low else 0.5 + 0 * values
    return [
        {
            "x": iteration + 1,
            "y": layer + 1,
            "text": f"{values[layer, iteration]:.3g}",
            "showarrow": False,
            "font": {
                "color": readable_on(mixed(colors, shares[layer, iteration])),
                "size": size,
            },
        }
        for layer, iteration in np.argwhere(np.isfinite(values)).tolist()
    ]


def mixed(colors: Sequence[str], share: float) -> str:
    """The colour at `share`, from 0 to 1, of the way through `colors`."""
    at = share * (len(colors) - 1)
    low = min(int(at), len(colors) - 2)
    start, end = (
        np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) for color in colors[low : low + 2]
    )
    red, green, blue = np.rint(start + (at - low) * (end - start)).astype(int)
    return f"#{red:02x}{green:02x}{blue:02x}"


def readable_on(color: str) -> str:
    """Black or white, whichever has the higher contrast (WCAG 2) with `color`: at least 4.5."""
    parts = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return "#000000" if linear @ (0.2126, 0.7152, 0.0722) > 0.179 else "#ffffff"


def layer_color(layer: int, num_layers: int) -> str:
    """The colour of a layer in curves, from the first (teal) to the last (pink)."""
    return mixed(_LAYER_COLORS, layer / max(1, num_layers - 1))


def _convergence(dynamics: Dynamics, when: str) -> Figure:
    rows = dynamics["rms_step"]
    L, T = len(rows), len(rows[0])
    hover = "iteration %{x}: <b>%{y:.4~g}</b>"
    curves = [_layer_curve(i, L, range(1, T + 1), row, hover) for i, row in enumerate(rows)]
    x_axis = {"title": {"text": "iteration"}, **_whole_ticks(T)}
    meaning = (
        "The movement of every layer, from the first (teal) to the last (pink). A straight line "
        "down is exponential convergence; a level line has not converged."
    )
    layout = _curve_layout(L, x_axis, "rms(x' - x)") | {"meta": {"log": True}}
    return Figure("Convergence", when + meaning, curves, layout)


def stability_limits(alpha) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where, as k = dt gate beta grows, the free motion of a channel changes its kind.

    With fixed coefficients, without candidate and excitation, e = x - mu follows
    `v' = alpha v - beta e, e' = e + dt gate v'`, a linear map of determinant alpha and trace
    1 + alpha - k. Its eigenvalues are real and positive up to the first limit (it glides), complex
    up to the second (it swings, by sqrt(alpha) smaller each time), negative up to the third (it
    jumps from side to side), and above that one is below -1 (it grows).
    """
    alpha = np.asarray(alpha)
    return (1 - np.sqrt(alpha)) ** 2, (1 + np.sqrt(alpha)) ** 2, 2 * (1 + alpha)


def _stability(dynamics: Dynamics, when: str) -> Figure:
    L = len(dynamics["alpha"])
    alpha = np.linspace(0, 1, 101)
    lowest, highest = min(1e-2, 0.5 * np.nanmin(_numbers(dynamics["stiffness"]))), 8.0
    limits = [np.maximum(limit, lowest) for limit in stability_limits(alpha)]
    regions = zip(
        (np.full(101, lowest), *limits),
        (*limits, np.full(101, highest)),
        (
            "rgba(47,166,160,.18)",
            "rgba(59,125,216,.18)",
            "rgba(194,149,26,.22)",
            "rgba(192,57,43,.22)",
        ),
        strict=True,
    )
    areas = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": _short((*alpha, *alpha[::-1])),
            "y": _short((*low, *high[::-1])),
            "fill": "toself",
            "fillcolor": color,
            "line": {"width": 0},
            "hoverinfo": "skip",
            "showlegend": False,
        }
        for low, high, color in regions
    ]
    hover = "alpha %{x:.4~g}, stiffness %{y:.4~g}"
    curves = [
        _layer_curve(i, L, dynamics["alpha"][i], dynamics["stiffness"][i], hover) for i in range(L)
    ]
    names = [
        {
            "text": text,
            "x": x,
            "y": float(np.log10(k)),
            "xanchor": anchor,
            "showarrow": False,
            "font": {"color": GRAY},
        }
        for text, x, k, anchor in (
            ("glides", 0.02, 0.03, "left"),
            ("swings", 0.98, 0.6, "right"),
            ("jumps", 0.02, 1.45, "left"),
            ("grows", 0.98, 5.5, "right"),
        )
    ]
    layout = _curve_layout(L, {"title": {"text": "alpha"}, "range": [0, 1]}, "dt gate beta")
    layout["yaxis"]["range"] = np.log10([lowest, highest]).tolist()
    layout["annotations"] = names
    meaning = (
        "Each layer's stiffest channel beside its mean alpha, a line through the iterations. "
        "The areas say how e = x - mu moves by itself: it glides to 0, swings round it, jumps from "
        "side to side, or grows."
    )
    return Figure("Stability", when + meaning, areas + curves, layout)


def _layer_curve(
    layer: int, num_layers: int, x: Iterable[float], y: Iterable[float | None], hover: str
) -> dict[str, Any]:
    few = num_layers <= _FEW_LAYERS
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": f"layer {layer + 1}",
        "x": _short(x),
        "y": _short(y),
        "line": {"color": layer_color(layer, num_layers), "width": 1.8 if few else 1.2},
        "marker": {"size": 6 if few else 3},
        "hovertemplate": f"layer {layer + 1}, {hover}<extra></extra>",
    }


def _curve_layout(num_layers: int, x_axis: dict[str, Any], y_title: str) -> dict[str, Any]:
    return {
        "hovermode": "closest",
        "showlegend": num_layers <= _FEW_LAYERS,
        "xaxis": x_axis,
        "yaxis": {"title": {"text": y_title}, "type": "log"},
    }


def _whole_ticks(n: int) -> dict[str, list[int]]:
    """At most about 8 whole numbers from 1 to n."""
    return {"tickvals": list(range(1, n + 1, -(-n // 8)))}


def _numbers(rows: Iterable[Iterable[float | None]]) -> np.ndarray:
    return np.array(rows, float)  # None becomes NaN


def _short(values: Iterable[float | None]) -> list[float | None]:
    """Five significant digits; null for what is not finite."""
    return [float(f"{a:.5g}") if np.isfinite(a) else None for a in np.array([*values], float)]
