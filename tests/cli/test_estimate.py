import json

import pytest

from inl_jax.planning.budget import ASSUMED_MFU
from inl_jax.planning.hardware import GPUS

COSTS = {"hours", "price", "kwh", "flops", "tokens_per_second", "mfu", "mfu_source"}


@pytest.fixture
def estimate(inl, monkeypatch):
    """Runs `inl estimate` in this process, where JAX has its devices already."""
    monkeypatch.setattr("inl_jax.planning.programs.xla.use_no_device", lambda _: None)
    monkeypatch.setattr("jax.config.update", lambda *_: None)
    return lambda *argv: inl("estimate", *argv, "--mesh.data", 1)


def test_estimate_holds_the_costs_of_the_device_at_the_top(estimate):
    flags = ["--config", "3b", "--tokens", "50e9", "--device", "a100-80gb", "--json"]
    code, out, err = estimate(*flags)
    record = json.loads(out)
    assert code == 0 and err == "" and record.keys() >= COSTS
    assert record["tokens"] == 50e9 and record["gpus"] == []
    assert record["mfu"] == ASSUMED_MFU and record["mfu_source"] == "assumed"
    given = ["--mfu", ".3", "--price", "2", "--watts", "100"]
    other = json.loads(estimate(*flags, *given)[1])
    assert other["hours"] == pytest.approx(record["hours"] * ASSUMED_MFU / 0.3)
    assert other["price"] == pytest.approx(2 * other["hours"])
    assert other["kwh"] == pytest.approx(0.1 * other["hours"])
    assert other["mfu_source"] == "given" and other["price_source"] == "--price"


def test_estimate_compares_gpus_and_says_which_do_not_fit(estimate):
    flags = ["--config", "4b", "--tokens", "10e9", "--gpus"]
    code, out, _ = estimate(*flags, "all", "--json")
    rows = {row["name"]: row for row in json.loads(out)["gpus"]}
    assert code == 0 and list(rows) == [gpu.name for gpu in GPUS]
    assert all(row.keys() >= COSTS and row["count"] == 1 for row in rows.values())
    assert rows["a100-80gb"]["fits"] and not rows["rtx4090"]["fits"]
    assert rows["rtx6000-ada"]["hours"] is None  # no peak is known
    assert estimate(*flags, "all", "h100", "--json")[1] == out
    code, out, _ = estimate(*flags, "rtx4090", "a100-80gb")
    *_, small, large, source = out.splitlines()
    assert "1 x rtx4090    does not fit: needs 50.79 GiB, usable 22.07 GiB" in small
    assert "1 x a100-80gb" in large and "at $1.50/h" in large and "kWh at 400 W" in large
    assert source.startswith("price of rtx4090, a100-80gb: the published training guide")
    assert "10.00B tokens, 3.96 per parameter" in out and "advises 15.00B tokens" in out
    assert "at 10% MFU, assumed; none is measured on a GPU yet" in out


def test_estimate_names_the_mixers_and_counts_attention_where_it_is(estimate):
    flags = ["--config", "tiny", "--model.context", "gated", "--model.attention_every"]
    code, out, err = estimate(*flags, 4)
    assert code == 0 and err == ""
    assert "gated context, attention in every 4th layer (cudnn kernel), 4 layers x " in out

    def flops(*flags):
        return json.loads(estimate(*flags, "--json")[1])["flops"]

    gated, mixed, attention = flops(*flags, 0), flops(*flags, 4), flops(*flags[:3], "attention")
    assert mixed == pytest.approx((3 * gated + attention) / 4, rel=1e-12)


def test_estimate_refuses_a_kernel_that_the_device_lacks(estimate):
    flags = ["--config", "large", "--model.integrator_kernel", "mosaic", "--device"]
    code, _, err = estimate(*flags, "a100-40gb")
    assert code == 2 and "needs a Hopper GPU, compute capability 9.x, not gpu 8.0" in err
    assert estimate(*flags, "h100")[0] == 0


def test_estimate_chooses_a_recipe_for_each_gpu_and_leaves_an_explicit_one(estimate):
    flags = ["--config", "3b", "--tokens", "10e9", "--gpus", "rtx4090", "a100-40gb", "h100"]
    _, out, _ = estimate(*flags, "--json")
    record = json.loads(out)
    small, middle, large = record["gpus"]
    assert record["accumulate_steps"] == large["accumulate_steps"] == 16
    assert record["device_bytes"] == large["device_bytes"] > middle["device_bytes"]
    assert [row["fits"] for row in record["gpus"]] == [False, True, True]
    assert small["accumulate_steps"] == middle["accumulate_steps"] == 64
    assert f"\n{record['recipe']}\n" in estimate(*flags)[1]
    explicit = ["--accumulate_steps", 64, "--model.remat", "block"]
    rows = json.loads(estimate(*flags, *explicit, "--json")[1])["gpus"]
    assert {(row["accumulate_steps"], row["remat"]) for row in rows} == {(64, "block")}
    assert len({row["device_bytes"] for row in rows}) == 1


def test_estimate_takes_the_tokens_of_the_run_unless_epochs_decide(estimate):
    _, out, _ = estimate("--config", "tiny", "--json")
    assert json.loads(out)["tokens"] == 450 * 16 * 128
    code, out, _ = estimate("--config", "tiny", "--num_steps", 0, "--num_epochs", 1)
    assert code == 0 and "--tokens N adds its time, rent and energy" in out
    assert " 0.0" not in estimate("--config", "tiny")[1].splitlines()[-2]  # says nothing


def test_estimate_takes_the_mfu_that_a_run_has_measured(estimate, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "mfu": 0.25}\n')
    flags = ["--config", "tiny", "--mfu_from", tmp_path]
    record = json.loads(estimate(*flags, "--json")[1])
    assert record["mfu"] == 0.25 and record["mfu_source"] == f"measured in {tmp_path}"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--mfu", "30"], "--mfu 30.0: must be from 0.0001 to 1"),
        (["--mfu", "1e-320"], "--mfu 1e-320: must be from 0.0001"),
        (["--tokens", "-1"], "--tokens -1.0: must be from 1 to 1e+18"),
        (["--tokens", "1e-320"], "--tokens 1e-320: must be from 1"),
        (["--watts", "nan"], "--watts nan: must be from 0 to 1e+06"),
        (["--price", "1e308"], "--price 1e+308: must be from 0 to 1e+06"),
        (["--devices", "0"], "--devices 0: must be from 1"),
        (["--num_steps", str(10**400)], "0: does not fit into 64 bits"),
        (["--mfu", ".3", "--mfu_from", "runs/x"], "give one of them"),
        (["--gpus", "a100"], "--gpus a100: choose one of a100-80gb, a100-40gb"),
        (["--mfu_from", "nowhere"], "--mfu_from nowhere: no run there"),
    ],
)
def test_estimate_answers_a_mistake_about_costs_in_one_line(estimate, flags, named):
    code, out, err = estimate("--config", "tiny", *flags)
    assert code == 2 and out == "" and named in err and err.count("\n") == 1
