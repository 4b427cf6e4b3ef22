import numpy as np
import pytest

from inl_jax.report.dynamics_charts import LOOKS
from inl_jax.report.inspect_page import inspect_page, visible
from inl_jax.watch.inspection import Inspected

pytest.importorskip("plotly", reason="the report extra is not installed")
HOSTILE = ["<script>", "alert(1)", "</script>", "", "é", "\n    ", "\x00&"]


@pytest.fixture
def text():
    """The page of two texts in a model of 2 layers and 3 iterations."""
    rng = np.random.default_rng(0)

    def one(texts):
        watched = {name: rng.uniform(0.1, 0.9, (2, 3, len(texts))) for name in LOOKS}
        watched["rms_error"][1, 2] = np.linspace(0.1, 0.7, len(texts))
        watched["cosine"][:, 0] = np.nan
        return Inspected("".join(texts), texts, watched)

    return inspect_page("Inside <tiny>", "2 layers & more", [one(HOSTILE), one(["one"])])


def test_inspect_page_holds_the_texts_as_text_and_nothing_to_load(text):
    assert "<script>alert" not in text and "<span>&lt;script&gt;</span>" in text
    assert "<h1>Inside &lt;tiny&gt;</h1>" in text and "2 layers &amp; more" in text
    assert "<span>⏎\n    </span>" in text and "<span>·</span>" in text  # newline, half a letter


@pytest.mark.parametrize(
    ("text", "seen"), [("", "·"), ("a b", "a b"), ("\n\t", "⏎⇥"), ("\x00\x1b\x7f", "␀␛␡")]
)
def test_visible_gives_every_character_a_letter(text, seen):
    assert visible(text) == seen


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1400])
def test_inspect_page_colours_tokens_in_a_browser(text, show, width):
    tab, errors, loaded = show(text, width)
    assert not errors and not loaded
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.locator(".js-plotly-plot").count() == tab.locator(".chart").count() == 22
    tokens, choices = tab.locator(".tokens").first.locator("span"), tab.locator(".choices").first
    assert tokens.all_inner_texts()[:3] == HOSTILE[:3]

    def colors():
        return tokens.evaluate_all("all => all.map((token) => token.style.backgroundColor)")

    first = colors()
    assert len(set(first)) == len(HOSTILE)
    tokens.nth(6).click()
    reading = tab.locator(".reading").first
    assert "Token 7, layer 2, iteration 3: distance to the equilibrium 0.7 ·" in (
        reading.inner_text()
    )
    choices.locator("select").select_option("cosine")
    second = colors()
    assert second != first
    choices.locator("input[type=range]").nth(1).fill("1")
    assert set(colors()) == {""}  # the first step has no direction
    assert "direction none" in reading.inner_text()
