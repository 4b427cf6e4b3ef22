"""The study of what helps a model learn: its corpora, forms, runs, tables and picture."""

import dataclasses
import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inl_jax.model.language_model import init_params
from inl_jax.training.state import state_from_params
from inl_jax.training.step import train_step


@pytest.fixture
def study(monkeypatch):
    """Imports a file of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module


def write(study, runs_dir, run, bits, flops=1e12, **other):
    """A run's result, as `train_runs` leaves it."""
    result = study("study").Result(bits, {}, 1000, flops, 1.0, [])._replace(**other)
    file = Path(runs_dir, f"{run.path}.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result._asdict()))


# --- corpora


def test_prose_has_no_examples_and_no_text_twice(study, monkeypatch, tmp_path):
    corpora = study("corpora")
    package = tmp_path / "package"
    package.mkdir()
    text = "A sentence that says what this does, and why. " * 6
    doc = f'"""{text}\n\n>>> call(1)\n2\n\nParameters\n----------\nx : a number\n"""\n'
    (package / "a.py").write_text(doc)
    (package / "b.py").write_text(doc + "def f():\n    'Too short.'\n")
    (package / "c.py").write_text("not python ((")
    monkeypatch.setattr(corpora, "topics", {})
    monkeypatch.setattr(corpora, "PACKAGES", ("package",))
    monkeypatch.syspath_prepend(tmp_path)
    (package / "__init__.py").write_text("")
    (path,) = corpora.corpus_paths("prose", tmp_path / "out")
    found = Path(path).read_text()
    assert found.count("what this does") == 6 and "x : a number" in found
    assert not any(part in found for part in (">>>", "---", "Too short", "not python"))
    Path(path).write_text("kept")
    assert corpora.corpus_paths("mixed", tmp_path / "out") == ("stdlib", path)
    assert Path(path).read_text() == "kept"


# --- questions


def test_names_tell_all_arms_apart(study):
    questions, load = study("questions"), study("study")
    runs = {run for question in questions.QUESTIONS.values() for run in question.runs}
    assert len({run.path for run in runs}) == len(runs)
    names = {run.arm.name for run in runs}
    assert set(questions.DEPTHS) <= names and {run.arm.form for run in runs} == set(load.FORMS)


def test_equal_feed_forward_costs_what_the_best_integrator_costs(study, tmp_path):
    questions, load = study("questions"), study("study")
    for context in ("decay", "gated", "attention"):
        arms = questions.arm(context, 2, T=1), questions.arm(context, questions.EQUAL)
        runs = [load.Run(arm, 128, "code", 1e-3, 0) for arm in arms]
        with_it, without = (
            load.flops_of_update(run.config(str(tmp_path)), load.FORMS[""]) for run in runs
        )
        assert with_it == without


# --- forms


@pytest.fixture
def small(study, monkeypatch, text_file, tmp_path):
    """A function from an arm to a run of it that is over in 6 updates."""
    load = study("study")
    monkeypatch.setattr(load, "SEQ_LEN", 16)
    monkeypatch.setattr(load, "corpus_paths", lambda name, folder: (str(text_file),))
    base = "data.tokenizer=bytes data.seq_len=16 model.vocab_size=300 model.num_layers=2"
    base += f" batch_size=4 optim.warmup_steps=2 data.cache_dir={tmp_path}"
    base += " data.validation_fraction=0.2"
    monkeypatch.setattr(load, "BASE", tuple(base.split()))
    sizes = {"model.d_model": 16, "model.num_heads": 2, "model.num_kv_heads": 1}
    monkeypatch.setattr(load, "WIDTHS", {16: sizes})
    return lambda arm: load.Run(arm, 16, "code", 1e-2, 0, updates=6)


def fresh(study, run, tmp_path):
    config = run.config(str(tmp_path))
    return config, study("study").FORMS[run.arm.form], init_params(config.model, jax.random.key(0))


@pytest.mark.slow
def test_shared_integrators_stay_equal_in_all_layers(study, small, tmp_path):
    _, form, params = fresh(study, small(study("questions").arm("gated", 2, T=1)), tmp_path)
    form = study("forms").FORMS["shared"]
    for tree in (form.init(params), form.tie(params)):
        for leaf in jax.tree.leaves(tree["blocks"]["integrator"]):
            np.testing.assert_array_equal(leaf[0], leaf[1])
    assert not np.array_equal(*form.init(params)["blocks"]["up_kernel"])


@pytest.mark.slow
def test_a_scale_learns_beta_and_the_gate_alone(study, small, tmp_path):
    run = small(study("questions").arm("gated", 2, T=1, C=0, form="scale"))
    _, form, params = fresh(study, run, tmp_path)
    ones = jax.tree.map(jnp.ones_like, params)
    integrator = form.tie(ones)["blocks"]["integrator"]
    learns = integrator.pop("output_bias")
    np.testing.assert_array_equal(learns[:, [0, 3]], 0)
    np.testing.assert_array_equal(learns[:, [1, 2]], 1)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(integrator))


@pytest.mark.slow
def test_other_scales_change_what_they_name(study, small, tmp_path):
    forms = study("forms")
    _, _, params = fresh(study, small(study("questions").GATED), tmp_path)
    for name, leaf in (("small_embedding", "embedding"), ("small_logits", "final_norm_scale")):
        changed = forms.FORMS[name].init(params)
        np.testing.assert_allclose(changed[leaf], forms.SMALL * params[leaf], rtol=1e-6)
        assert all(changed[other] is params[other] for other in params if other != leaf)


@pytest.mark.slow
def test_closed_integrators_neither_move_nor_learn(study, small, tmp_path):
    forms = study("forms")
    run = small(study("questions").arm("gated", 2, T=2, form="every_other"))
    config, form, params = fresh(study, run, tmp_path)
    params = form.init(params)
    batch = jnp.arange(4 * 17).reshape(4, 17) % 300
    grads = jax.grad(study("study").loss_fn)(params, batch, None, config=config)
    for leaf in jax.tree.leaves(grads["blocks"]["integrator"]):
        assert np.all(leaf[1] == 0) and np.all(np.isfinite(leaf[0]))
    assert np.any(grads["blocks"]["integrator"]["output_kernel"][0] != 0)
    without = dataclasses.replace(config.model, num_iterations=0)
    both = [forms.flops_per_token(model, 16) for model in (config.model, without)]
    assert form.flops(config.model, 16) == sum(both) / 2


@pytest.mark.slow
def test_penalties_are_those_of_their_formulas_and_have_gradients(study, small, tmp_path):
    forms = study("forms")
    run = small(study("questions").arm("decay", 2, T=3))
    config, _, params = fresh(study, run, tmp_path)
    ids = jnp.arange(2 * 16).reshape(2, 16) % 300
    x_LTBSD, v_LTBSD, mu_LD = forms._trajectories(config.model, params, ids)
    assert x_LTBSD.shape == (2, 3, 2, 16, 16)
    energy = forms.FORMS["energy"].penalty(config.model, params, ids)
    np.testing.assert_allclose(energy, 0.01 * np.mean(np.square(v_LTBSD)), rtol=1e-5)
    speed = forms.FORMS["speed"].penalty(config.model, params, ids)
    away = np.abs(x_LTBSD - mu_LD[:, None, None, None]).mean((0, 2, 3, 4))
    np.testing.assert_allclose(speed, 0.1 * away @ np.exp(-np.arange(3) / 3), rtol=1e-5)
    for name in ("mean", "speed", "energy"):
        gradient = jax.grad(forms.FORMS[name].penalty, argnums=1)(config.model, params, ids)
        norms = [float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(gradient)]
        assert np.all(np.isfinite(norms)) and sum(norms) > 0


def test_random_depth_draws_every_depth_as_often(study, small, tmp_path):
    run = small(study("questions").arm("gated", 2, T=3, form="random_depth"))
    config, form, _ = fresh(study, run, tmp_path)
    drawn = np.bincount([form.depth(config.model, update) for update in range(3000)])
    assert drawn[0] == 0 and np.all(np.abs(drawn[1:] - 1000) < 20)
    two = dataclasses.replace(config.model, num_iterations=2)
    assert form.flops(config.model, 16) == study("forms").flops_per_token(two, 16)


# --- runs


@pytest.mark.slow
def test_train_run_updates_as_the_trainer_does(study, small, monkeypatch, tmp_path):
    load, run = study("study"), small(study("questions").arm("gated", 2, T=1))
    updated = []
    update = load._update
    monkeypatch.setattr(
        load, "_update", lambda *args: updated.append((args[4], args[5])) or update(*args)
    )
    result = load.train_run(run, str(tmp_path), depths=(2,))
    config = dataclasses.replace(run.config(str(tmp_path)), accumulate_steps=1)
    state = state_from_params(init_params(config.model, jax.random.key(0)), config=config)
    for batch, rate in updated:
        state, metrics = train_step(
            state, batch, rate, config=config, optimizer=load.make_optimizer(config)
        )
    assert len(updated) == 6 and set(result.by_depth) == {"2"}
    np.testing.assert_allclose(result.losses[-1], metrics["loss"], rtol=1e-5)


@pytest.mark.slow
def test_train_runs_trains_what_is_missing(study, tmp_path):
    load, questions = study("study"), study("questions")
    there, missing = questions.runs_of([questions.BEST], seeds=(0, 1), updates=60)
    write(study, tmp_path, there, 0.5)
    load.train_runs([there, missing], str(tmp_path), depths={missing.arm.name: (2,)})
    assert load.read_result(there, str(tmp_path)).bits_per_byte == 0.5
    found = load.read_result(missing, str(tmp_path))
    assert 2 < found.bits_per_byte < 8 and set(found.by_depth) == {"2"}
    assert found.losses[-1] < found.losses[0]


# --- tables


@pytest.fixture
def results(study, tmp_path):
    """Results of gated with three widths of feed-forward, and of the integrator."""
    questions = study("questions")
    for F, flops in ((2, 1e12), (questions.EQUAL, 1.2e12), (4, 2e12)):
        for run in questions.runs_of([questions.arm("gated", F)], seeds=(0, 1)):
            write(study, tmp_path, run, 2.0 - 0.01 * F + 0.02 * run.seed, flops)
    for run in questions.runs_of([questions.BEST], seeds=(0, 1)):
        write(study, tmp_path, run, 1.9, 1.2e12)
    return str(tmp_path)


def test_integrator_is_compared_at_its_own_flops(study, results):
    learning, questions = study("learning"), study("questions")
    everything = learning.find(questions.QUESTIONS["cost"].runs, results)
    by_name = {one.name: one for one in everything}
    found = by_name[questions.BEST.name]
    base = learning.without_integrator(found, everything)
    np.testing.assert_allclose(base, by_name[f"gated F{questions.EQUAL:g}"].mean)
    between = learning.without_integrator(found._replace(flops=2**0.5 * 1e12), everything)
    assert by_name["gated F4"].mean < between < by_name["gated F2"].mean
    assert learning.without_integrator(found._replace(flops=3e12), everything) is None
    equal = [one for one in everything if one.flops == found.flops]
    assert learning.without_integrator(found, equal) == base
    row = learning.table_rows([found], everything)[0]
    assert row["code"] == "1.9000" and row["beside T 0, code"] == f"{100 * (1.9 / base - 1):+.2f}%"


def test_learning_says_that_no_run_has_ended(study, capsys, tmp_path):
    argv = f"--questions depth --runs_dir {tmp_path} --read_only --out {tmp_path / 'p.png'}"
    study("learning").main(argv.split())
    assert capsys.readouterr().out.endswith("No run of it has ended.\n")
    assert not (tmp_path / "p.png").exists()


def test_learning_prints_a_table_for_a_question_and_draws(study, results, capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    picture = tmp_path / "learning.png"
    argv = f"--questions integrator --runs_dir {results} --read_only --out {picture}"
    study("learning").main(argv.split())
    out = capsys.readouterr().out
    assert "### integrator" in out and "| gated F2 | 128 | 0.005 | 1,000 |" in out
    assert "1.9900 ± 0.0100" in out and "1.9000 ± 0.0000" in out
    assert picture.stat().st_size > 0
