import dataclasses
import json

import pytest

from inl_jax.config import InputError
from inl_jax.config_file import load_config
from inl_jax.planning.budget import budget, energy, guide_minimum, measured_mfu, rent
from inl_jax.planning.hardware import find_gpu

A100 = find_gpu("a100-80gb")


def cost(tokens=10e9, gpu=A100, num_gpus=1, mfu=0.4):
    return budget(load_config("3b"), tokens, gpu, num_gpus, mfu=mfu, mfu_source="given")


def test_budget_of_the_guides_3b_is_two_weeks_on_an_a100_and_not_a_day():
    found = cost()
    assert found.flops == pytest.approx(10e9 * 15.34e9, rel=1e-3)
    assert found.hours / 24 == pytest.approx(14.2, rel=0.01)
    assert found.tokens_per_second == pytest.approx(0.4 * 312e12 / 15.34e9, rel=1e-3)
    assert found.price == pytest.approx(1.50 * found.hours)
    assert found.kwh == pytest.approx(0.400 * found.hours)


def test_budget_of_more_gpus_takes_less_time_at_the_same_price():
    one, eight = cost(), cost(num_gpus=8)
    assert eight.hours == pytest.approx(one.hours / 8)
    assert (eight.price, eight.kwh, eight.flops) == pytest.approx((one.price, one.kwh, one.flops))


def test_budget_leaves_out_what_the_table_lacks():
    no_price = cost(gpu=dataclasses.replace(A100, price=None))
    assert no_price.price is None and no_price.hours == cost().hours
    no_peak = cost(gpu=find_gpu("rtx6000-ada"))
    assert no_peak.hours is no_peak.price is no_peak.kwh is no_peak.tokens_per_second is None
    assert no_peak.flops == cost().flops


def test_rent_and_energy_count_every_gpu_for_the_whole_time():
    assert rent(A100, 8, 1800) == pytest.approx(8 * 0.5 * 1.50)
    assert energy(A100, 8, 1800) == pytest.approx(8 * 0.5 * 0.4)


def test_guide_minimum_goes_by_size_and_not_by_name():
    sizes = {"3b": 1_698_168_832, "attention": 1_949_919_232, "4b": 2_524_502_784, "large": 3e8}
    assert [guide_minimum(n) for n in sizes.values()] == [10e9, 10e9, 15e9, None]


def test_measured_mfu_is_the_median_of_the_updates(tmp_path):
    def write(*shares):
        lines = [json.dumps({"step": i, "loss": 1.0, "mfu": mfu}) for i, mfu in enumerate(shares)]
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines))

    with pytest.raises(InputError, match="--mfu_from .*no run there"):
        measured_mfu(tmp_path)
    write(0, None, "0.2", float("nan"), 1.5)  # damaged
    with pytest.raises(InputError, match="--mfu_from .*no record there has an MFU"):
        measured_mfu(tmp_path)
    write(0.01, 0.2, 0, 0.21)
    assert measured_mfu(tmp_path) == 0.2
