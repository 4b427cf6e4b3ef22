"""The HTML page around charts: one file that needs no network."""

import html
from pathlib import Path
from typing import Any

from inl_jax.config import InputError
from inl_jax.files import json_text
from inl_jax.report.charts import Figure

_HERE = Path(__file__).parent

# The browser itself holds the promise: it may load nothing at all.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:"
)


def page(title: str, body: str) -> str:
    """A whole HTML page: `body` between the styles, plotly.js and the script that draws.

    The page follows the reader's light or dark theme. Figures of `figure_html` whose traces hold
    `meta.x` share one switch for the horizontal axis, in an element with the id `controls`.

    Args:
      title: plain text.
      body: HTML; the caller has escaped what comes from a run.

    Raises:
      InputError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise InputError("a page with charts needs plotly: pip install 'inl_jax[report]'") from None
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{html.escape(title)}</title>
<style>
{(_HERE / "page.css").read_text()}</style>
<script>{get_plotlyjs()}</script>
</head>
<body>
<main>
{body}
</main>
<script>
{(_HERE / "page.js").read_text()}</script>
</body>
</html>
"""


def figure_html(figure: Figure) -> str:
    """A chart with its title and caption, for a place inside `<div class="charts">`."""
    caption = f"<p>{html.escape(figure.caption)}</p>" if figure.caption else ""
    return f"""<figure class="chart">
<figcaption><h3>{html.escape(figure.title)}</h3>{caption}</figcaption>
<div class="plot"></div>
<script type="application/json">{to_json({"data": figure.data, "layout": figure.layout})}</script>
</figure>"""


def to_json(value: Any) -> str:
    """`value` as JSON that may stand inside `<script>`; numbers that are not finite become null."""
    return json_text(value).replace("<", "\\u003c")
