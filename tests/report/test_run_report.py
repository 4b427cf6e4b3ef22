import re

import pytest

from inl_jax.report import run_report
from inl_jax.report.run_report import MAX_SAMPLES, report

HOSTILE = "</script><script>document.title = 'broken'</script><img src=x onerror=alert(1)>"


@pytest.fixture
def body(monkeypatch):
    """The body of the page about runs, without plotly.js."""
    monkeypatch.setattr(run_report, "page", lambda title, body: body)
    return lambda *runs: report(runs)


def samples(step, text="more"):
    sample = {"prompt": "The", "greedy": f" {text}", "sampled": f" {text}"}
    return {"step": step, "num_steps": 20, "samples": [sample]}


def full_run(make_run, evaluation, name, text="more"):
    """A run that recorded all there is."""
    start = {
        "time": "2026-01-01T00:00:00+00:00",
        "host": text,
        "command": "inl train",
        "devices": {"kind": "NVIDIA H100 80GB HBM3", "count": 2},
    }
    fields = {"train_loss": 3.9, "gap": 0.1, "verdict": "good"}
    fields["sources"] = {text: {"loss": 3.0}, "code": {"loss": 2.0}}
    run = make_run(
        name,
        records=[evaluation(10, 4.0, **fields), evaluation(20, 3.8, **fields), samples(20, text)],
        environment={"starts": [start]},
        config={"name": text},
    )
    for record in run.records:
        step = record["step"]
        record |= {"time": 1767225600 + step, "elapsed": step}
        if "loss" in record:
            record |= {"tokens": 512 * step, "gpu_util": 0.9, "gpu_watts": 500, "mfu": 0.3}
            record |= {"peak_memory": 2**30, "gpu_memory": 2**31, "skipped": step // 10}
    return run


def test_report_gives_the_aims_in_bits_per_byte_of_the_tokenizer(body, make_run, evaluation):
    text = body(make_run(records=[evaluation(10, 4.0)]))  # 4 bytes per token
    assert "<td>54.60</td>" in text and "<td>1.443</td>" in text  # reached
    assert "<td>1.080</td>" in text and "<td>0.830</td>" in text  # log2(20) / 4, log2(10) / 4
    assert "aims" not in body(make_run())


def test_report_says_what_differs_between_configs_and_only_that(body, make_run):
    a = make_run("a", config={"seed": 1, "model": {"context": "decay", "d_model": 8}})
    b = make_run("b", config={"seed": 1, "model": {"context": "mean", "d_model": 8}})
    differs = re.search(r"What differs(.*?)</section>", body(a, b))[1]
    assert "<th>model.context</th><td>decay</td><td>mean</td>" in differs
    assert "d_model" not in differs and "seed" not in differs
    assert "the configs are the same" in body(a, a._replace(name="b"))
    assert "What differs" not in body(a)


def test_report_shows_some_of_many_samples_and_says_so(body, make_run):
    run = make_run(records=[samples(step) for step in range(1, 101)], updates=100)
    text = body(run)
    assert text.count('<div class="step">') == MAX_SAMPLES
    assert f"{MAX_SAMPLES} of 100 are shown" in text
    assert ">update 1<" in text and ">update 100<" in text


def test_report_shows_what_comes_from_a_run_as_text(body, make_run, evaluation):
    text = body(full_run(make_run, evaluation, HOSTILE, HOSTILE))
    assert "<img" not in text and text.count("<script") == text.count('type="application/json">')


def test_report_of_one_record_and_of_losses_that_are_not_finite_is_a_page(body, make_run):
    assert "Training loss" in body(make_run(updates=1))
    run = make_run()
    for record in run.records:
        record |= {"loss": None, "perplexity": float("nan"), "grad_norm": float("inf")}
    text = body(run)
    assert "Learning rate" in text and "Training loss" not in text and "NaN" not in text


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1400], ids=["phone", "desktop"])
def test_report_is_drawn_in_a_browser_without_network_errors_or_overflow(
    show, make_run, evaluation, width
):
    runs = [full_run(make_run, evaluation, name, HOSTILE) for name in ("a", "b")]
    tab, errors, loaded = show(report(runs), width)
    charts = tab.locator(".chart").count()
    assert charts == 13 and tab.locator(".chart .plot svg.main-svg").count() >= charts
    for i in range(charts):
        assert tab.locator(".chart").nth(i).locator(".scatterlayer .trace").count() > 0
    columns = {round(box.bounding_box()["x"]) for box in tab.locator(".chart").all()}
    assert len(columns) == (1 if width == 390 else 2)
    assert tab.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    assert tab.title() == "a, b" and not errors and not loaded


@pytest.mark.slow
def test_report_moves_all_curves_between_updates_tokens_and_hours(show, make_run, evaluation):
    tab, errors, _ = show(report([full_run(make_run, evaluation, "a")]), 1400)
    read = """Array.from(document.querySelectorAll(".plot"),
        ({ data, layout }) => [data[0].x.at(-1), layout.xaxis.title.text])"""
    for name, last, title in (
        ("tokens", 10240, "tokens"),
        ("hours", 0.00555556, "hours of training"),
        ("updates", 20, "updates"),
    ):
        tab.get_by_role("button", name=name).click()
        assert {tuple(found) for found in tab.evaluate(read)} == {(last, title)}
    tab.get_by_role("checkbox").check()
    shown = "document.querySelector('.plot').data.map(t => t.visible)"
    assert tab.evaluate(shown)[1] is True and not errors
