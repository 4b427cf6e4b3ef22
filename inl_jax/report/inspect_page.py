"""The page of `inl inspect`: what the integrator does with texts, by layer, iteration and token."""

import html
from collections.abc import Sequence
from pathlib import Path

from inl_jax.console import plural
from inl_jax.report.dynamics_charts import iteration_figures, looks_after, token_figures
from inl_jax.report.page import figure_html, page, to_json
from inl_jax.watch.inspection import Inspected

_HERE = Path(__file__).parent
_EQUATIONS = """\
v' = alpha v + (1 - alpha) c - beta (x - mu) + s
x' = x + dt gate v'"""


def visible(text: str) -> str:
    """`text` with a letter for what is not seen: ⏎ for a newline, ␀ for NUL, · for nothing."""
    seen = text.replace("\n", "⏎").replace("\t", "⇥").replace("\x7f", "␡")
    return "".join(chr(0x2400 + ord(c)) if ord(c) < 32 else c for c in seen) or "·"


def inspect_page(title: str, facts: str, inspected: Sequence[Inspected]) -> str:
    """The whole page, with the texts in their order.

    Args:
      title: names the run; plain text.
      facts: a line about the model; plain text.
      inspected: at least one text.

    Raises:
      InputError: plotly is not installed.
    """
    sections = [
        f"<style>\n{(_HERE / 'inspect.css').read_text()}</style>",
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="soft">{html.escape(facts)}</p>',
        f"""<div class="equations"><pre class="text">{_EQUATIONS}</pre>
<p>In each layer every token has a state <i>x</i>, which starts as the normalised stream, and a
velocity <i>v</i>, which starts at 0. Each iteration pulls the state towards the layer's learned
equilibrium mu. Four small networks choose alpha, beta, gate and the candidate c, anew for each
token and iteration; s is a small harmonic.</p></div>""",
        *(_section(one) for one in inspected),
        f"<script>\n{(_HERE / 'inspect.js').read_text()}</script>",
    ]
    return page(title, "\n".join(sections))


def _section(one: Inspected) -> str:
    start = one.prompt if len(one.prompt) <= 60 else one.prompt[:59] + "…"
    maps, curves = iteration_figures(one.dynamics)
    labels = [visible(text).replace(" ", "␣") for text in one.texts]
    rows = "".join(map(figure_html, token_figures(one.watched_LTS, labels)))
    width = 17 * len(labels) + 120
    map_width = 270 if len(one.dynamics["alpha"][0]) <= 3 else 350  # the cells hold numbers
    return f"""<section>
<h2>{html.escape(start) or "The empty text"} <small>{plural(len(one.texts), "token")}</small></h2>
{_tokens(one)}
<h3 class="part">Layer by iteration, over all tokens</h3>
<div class="charts maps" style="--width: {map_width}px">{"".join(map(figure_html, maps))}</div>
<div class="charts below">{"".join(map(figure_html, curves))}</div>
<h3 class="part">Layer by token</h3>
<div class="charts rows" style="--width: {width}px">{rows}</div>
</section>"""


def _tokens(one: Inspected) -> str:
    """The text, whose tokens `inspect.js` colours by a quantity, a layer and an iteration."""
    letters = (visible(text).replace("⏎", "⏎\n") for text in one.texts)
    spans = "".join(f"<span>{html.escape(text)}</span>" for text in letters)
    data = {
        name: {
            "title": look.title,
            "colors": look.colors.split(),
            "limits": look.limits,
            "values": [
                [[float(f"{value:.4g}") for value in row] for row in layer]
                for layer in one.watched_LTS[name]
            ],
        }
        for name, look in looks_after(one.watched_LTS["alpha"].shape[1]).items()
    }
    return f"""<div class="probe">
<div class="choices"></div>
<div class="tokens">{spans}</div>
<p class="soft">Each token has the colour of its own value in the chosen layer and iteration. The
colours run from the lowest value of the layer to its highest, so they compare tokens and
iterations. A dot is a part of the character that follows.</p>
<p class="soft reading">Point at a token, or touch it, for its numbers.</p>
<script type="application/json">{to_json(data)}</script>
</div>"""
