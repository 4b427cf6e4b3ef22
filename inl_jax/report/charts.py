"""Records of runs as charts: plain dictionaries that plotly.js draws."""

from typing import Any, NamedTuple


class Figure(NamedTuple):
    """One chart. `page.figure_html` makes it part of a page."""

    title: str
    caption: str
    data: list[dict[str, Any]]
    """Traces of plotly.js. `meta.x`, {"updates": [...], "tokens": [...], "hours": [...]}, gives the
    horizontal positions that a reader may choose among."""
    layout: dict[str, Any]
    """Layout of plotly.js. The page sets fonts, margins and the colours of the theme; `meta.log`
    offers a logarithmic vertical axis, and `height`, in pixels, is 300 by default."""
