"""The studies that train: which configs they run, and what their tables say of the records."""

import importlib
import types
from pathlib import Path

import pytest


@pytest.fixture
def study(monkeypatch):
    """Imports a file of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module


@pytest.fixture
def trained(study, monkeypatch):
    """The configs that `train_variants` trains; each run's loss falls to that of its turn."""
    configs = []

    def train(config):
        configs.append(config)
        steps = range(config.eval_every, config.num_steps + 1, config.eval_every)
        losses = [{"step": 1, "loss": 9.0, "seconds_per_step": 0.25}]
        curve = [
            {"step": n, "validation_loss": 2.0 + 0.1 * len(configs), "validation_bits_per_byte": b}
            for n, b in zip(steps, range(len(steps), 0, -1), strict=True)
        ]
        return types.SimpleNamespace(history=losses + curve)

    monkeypatch.setattr(study("variants"), "train", train)
    return configs


def test_recipes_trains_bfloat16_parameters_by_each_recipe(study, trained, capsys):
    study("recipes").main(["--runs_dir", "r", "--num_steps", "800", "batch_size=8"])
    assert [config.run_dir for config in trained] == [f"r/{i}" for i in range(6)]
    assert {config.model.param_dtype for config in trained} == {"bfloat16"}
    assert {(config.num_steps, config.batch_size) for config in trained} == {(800, 8)}
    optims = [config.optim for config in trained]
    rounding = ["masters", "stochastic", "masters", "stochastic", "stochastic", "masters"]
    assert [o.rounding for o in optims] == rounding
    assert [o.state_memory == "pinned_host" for o in optims] == [0, 0, 1, 1, 0, 1]
    usual = trained[0].accumulate_steps
    assert [config.accumulate_steps for config in trained] == [usual] * 5 + [4]
    head, _, first, *_, last = capsys.readouterr().out.splitlines()
    assert head == "| recipe | validation loss at the end | beside the first |"
    assert first == "| float32 masters and moments | 2.1000 | +0.00% |"
    assert last.endswith("| 2.6000 | +23.81% |")


def test_overrides_have_priority_over_a_variant(study, trained):
    # The config's own 50 warmup steps would be too many for 20 updates.
    changes = ["accumulate_steps=2", "optim.warmup_steps=10", "eval_every=5"]
    study("recipes").main(["--num_steps", "20", *changes])
    assert {(c.accumulate_steps, c.optim.warmup_steps, c.num_steps) for c in trained} == {
        (2, 10, 20)
    }


def test_train_variants_checks_all_configs_before_it_trains_one(study, trained, capsys):
    with pytest.raises(SystemExit) as stop:
        study("recipes").main(["batch_size=6"])  # 4 micro-batches do not divide it
    assert stop.value.code == 2 and trained == []
    assert "batch_size" in capsys.readouterr().err


def test_compare_tabulates_and_draws_each_mixer_and_t(study, trained, capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    picture = tmp_path / "curves.png"
    study("compare").main(["--out", str(picture), "--runs_dir", "r", "--num_steps", "300"])
    names = [f"r/{c}-{t}" for t in (0, 2, 5) for c in ("mean", "decay", "gated", "attention")]
    assert [config.run_dir for config in trained] == names[1:]
    head, _, *rows = capsys.readouterr().out.splitlines()
    cells = [name.strip() for name in head.split("|")[1:-1]]
    assert cells[4:-1] == ["100 updates", "200 updates", "300 updates"]
    assert len(rows) == 11 and rows[0].startswith("| decay, T = 0 | 857,856 | 10.5 | 250 | 3.000")
    assert rows[0].endswith("| 1.000 |")  # the cheapest run ends where the budget does
    assert picture.stat().st_size > 0


def test_bits_at_a_budget_lie_between_the_nearest_updates(study):
    curve = study("compare").Curve("c", "decay", 2, 1, 10, 1.0, [100, 200], [3.0, 2.0])
    assert [curve.bits_at(f) for f in (0, 1000, 1250, 2000, 9999)] == [3, 3, 2.75, 2, 2]


@pytest.mark.slow
def test_recipes_trains(study, monkeypatch, capsys, tmp_path, text_file):
    recipes = study("recipes")
    monkeypatch.setattr(recipes, "RECIPES", dict(list(recipes.RECIPES.items())[:2]))
    small = f"data.paths={text_file} data.tokenizer=bytes data.seq_len=32 data.cache_dir={tmp_path}"
    small += " data.validation_fraction=0.1 model.vocab_size=300 model.d_model=16 model.d_ff=32"
    small += " model.num_layers=2 model.num_iterations=3 model.controller_width=8 batch_size=8"
    small += " accumulate_steps=1 mesh.data=1 optim.warmup_steps=2"
    recipes.main(["--runs_dir", str(tmp_path / "r"), "--num_steps", "4", *small.split()])
    assert len(capsys.readouterr().out.split("+0.00% |")) == 2
    assert (tmp_path / "r/1/metrics.jsonl").is_file()
