import math
import shutil
from pathlib import Path

import pytest

from inl_jax.report.run import Run


@pytest.fixture
def make_run():
    """Makes a run of records: `make_run("b", updates=50, records=[...], environment={...})`."""

    def make(name="a", *, updates=20, records=(), config=(), environment=(), best=()):
        def update(step):
            loss = 3 + 5 / step
            return {
                "step": step,
                "num_steps": updates,
                "loss": loss,
                "perplexity": math.exp(loss),
                "learning_rate": 1e-3,
                "grad_norm": 1 / step,
                "seconds_per_step": 0.5,
                "tokens_per_second": 1000.0,
                "input_wait": 0.0,
                "seconds_left": 0.5 * (updates - step),
                "samples_seen": 4 * step,
                "skipped": 0,
            }

        every = [update(step) for step in range(1, updates + 1)] + list(records)
        return Run(
            name,
            Path(name),
            sorted(every, key=lambda record: record["step"]),
            {"data": {"seq_len": 128}} | dict(config),
            dict(environment),
            dict(best),
        )

    return make


@pytest.fixture
def evaluation():
    """Makes the record of an evaluation: `evaluation(10, 4.0)`."""

    def make(step, loss, **fields):
        return {
            "step": step,
            "num_steps": 20,
            "validation_loss": loss,
            "validation_perplexity": math.exp(loss),
            "validation_bits_per_byte": loss / math.log(2) / 4,
            "validation_tokens": 1000,
        } | fields

    return make


@pytest.fixture(scope="session")
def chromium():
    """A headless Chromium; skips where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="make browser installs playwright")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if path is None:
        pytest.skip("there is no Chromium: make browser installs it")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def show(chromium, tmp_path):
    """Shows a page at a width; returns the tab, its console's errors, and what it asked to load."""

    def show(text, width):
        path = tmp_path / "page.html"
        path.write_text(text)
        tab = chromium.new_page(viewport={"width": width, "height": 900})
        errors, loaded = [], []
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("console", lambda line: line.type == "error" and errors.append(line.text))
        tab.on("request", lambda request: loaded.append(request.url))
        tab.goto(path.as_uri())
        tab.wait_for_selector("html[data-drawn]")
        return tab, errors, [url for url in loaded if not url.startswith(("file:", "data:"))]

    return show
