import json
import re
import sys

import pytest

from inl_jax.config import InputError
from inl_jax.report.charts import Figure
from inl_jax.report.page import figure_html, page, to_json


def test_to_json_cannot_end_the_script_around_it():
    text = "</script><script>alert(1)</script><!--"
    assert "<" not in to_json({text: [text]})
    assert json.loads(to_json({text: [text]})) == {text: [text]}


def test_to_json_makes_null_of_numbers_that_are_not_finite():
    values = {"y": [1.5, float("nan"), (float("inf"), 2)], "n": -float("inf")}
    assert json.loads(to_json(values)) == {"y": [1.5, None, [None, 2]], "n": None}


def test_figure_holds_its_data_and_shows_its_words_as_text():
    figure = Figure("a < b", "<b>", [{"y": [1, 2]}], {"height": 200})
    text = figure_html(figure)
    assert "<h3>a &lt; b</h3><p>&lt;b&gt;</p>" in text
    (held,) = re.findall(r'<script type="application/json">(.*)</script>', text)
    assert json.loads(held) == {"data": figure.data, "layout": figure.layout}


def test_page_holds_all_that_it_needs():
    pytest.importorskip("plotly")
    text = page("a <run>", "<p>body</p>")
    assert "<title>a &lt;run&gt;</title>" in text and "<p>body</p>" in text
    assert "plotly.js v" in text and "default-src 'none'" in text
    assert not re.search(r'(src|href)="(?!data:)', text.replace(text[text.index("/**") :], ""))


def test_page_without_plotly_gives_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(InputError, match=r"pip install 'inl_jax\[report\]'$"):
        page("a", "")


def drawn(*figures):
    pytest.importorskip("plotly")
    return page("a", f'<div class="charts">{"".join(map(figure_html, figures))}</div>')


@pytest.mark.slow
def test_toolbar_covers_nothing_in_a_browser(show):
    curves = [{"name": "a run of a long name " * 2, "y": [1, 2, 100]}] * 3
    layout = {"showlegend": True, "xaxis": {"title": {"text": "updates"}}}
    tab, *_ = show(
        drawn(
            Figure("", "", curves, layout), Figure("", "", [{"type": "heatmap", "z": [[1]]}], {})
        ),
        1400,
    )
    curve, heat_map = tab.locator(".plot").all()
    assert heat_map.locator(".modebar-btn").count() == 0
    boxes = [box.bounding_box() for box in curve.locator(".modebar-btn").all()]
    left, top = min(box["x"] for box in boxes), min(box["y"] for box in boxes)
    for box in curve.locator(".nsewdrag, .legend, .xtick text, .xtitle").all():
        found = box.bounding_box()
        assert found["x"] + found["width"] <= left or found["y"] + found["height"] <= top


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0.03, 8], {"0.05", "0.1", "0.2", "0.5", "1", "2", "5"}),
        ([1e-5, 1e3], {"0.0001", "0.01", "1", "100"}),
    ],
)
def test_a_logarithmic_axis_writes_its_numbers_out(show, values, labels):
    tab, *_ = show(drawn(Figure("", "", [{"y": values}], {"yaxis": {"type": "log"}})), 1400)
    assert labels <= set(tab.locator(".ytick").all_text_contents())


@pytest.mark.slow
def test_a_long_word_stands_behind_its_indentation(show):
    pytest.importorskip("plotly")
    text = f'<p class="text"><span>def f():</span>\n    self.{"_" * 500}</p>'
    tab, *_ = show(page("a", text), 390)
    second_line = """() => {
        const node = document.querySelector(".text").lastChild;
        const place = document.createRange();
        place.setStart(node, node.data.indexOf("self"));
        place.setEnd(node, node.data.indexOf("self") + 1);
        const [letter, first] = [place, document.querySelector(".text span")].map(
            (part) => part.getBoundingClientRect());
        return [(letter.top - first.top) / first.height, (letter.left - first.left) / letter.width];
    }"""
    lines, letters = tab.evaluate(second_line)
    assert 1 <= lines < 2 and round(letters) == 4
