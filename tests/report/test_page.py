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
