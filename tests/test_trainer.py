import dataclasses
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_same
from hub import COMMITS, Hub

import inl_jax
from inl_jax import trainer
from inl_jax.config import InputError, MeshConfig, Phase, with_fields
from inl_jax.config_file import to_json
from inl_jax.data import batches
from inl_jax.data.corpus import prepare
from inl_jax.failures import EXIT_INTERRUPTED, Stalled
from inl_jax.planning import preflight
from inl_jax.storage import checkpoint, weights
from inl_jax.storage.run_dir import locked, read_config
from inl_jax.training import state
from inl_jax.training.metrics import read_metrics
from inl_jax.training.reader import Reader
from inl_jax.training.step import compile_step, loss_fn
from inl_jax.training.stop import Stopped
from inl_jax.watch import step_timer

ROOT = Path(__file__).parents[1]


def saved_state(config, step):
    folder = Path(config.run_dir).absolute() / "checkpoints" / str(step)
    return checkpoint.ocp.load_checkpointables(folder)


def stop_at(step, number=signal.SIGTERM):
    """A hook that sends this process a signal when update `step` is recorded."""

    def on_record(record):
        if record["step"] == step and "loss" in record:
            os.kill(os.getpid(), number)

    return on_record


def test_train_lowers_the_loss_and_returns_a_model_that_generates(
    train_config, monkeypatch, capsys
):
    monkeypatch.setattr(trainer, "compile_step", compile_step)  # and not one of another test
    config = train_config(
        num_steps=40,
        sample_every=40,
        sample_tokens=8,
        eval_every=20,
    )
    result = trainer.train(config)
    assert result.history[0]["learning_rate"] > 0  # the first update is not lost
    losses = [r["loss"] for r in result.history if "loss" in r]
    assert len(losses) == 40 and losses[-1] < losses[0] - 1.5
    validation = [r["validation_loss"] for r in result.history if "validation_loss" in r]
    assert len(validation) == 2 and validation[-1] < validation[0]
    assert result.history == read_metrics(config.run_dir)
    assert isinstance(result.model.generate("the ", max_new_tokens=5), str)
    out = capsys.readouterr().out
    n = inl_jax.param_count(config.model)
    for said in (
        f"{n:,} parameters",
        "40 updates of 256 tokens",
        "epochs",
        "matrix products float32",
        "cpu",
        "compiling",
        "compiled in",
        "loss",
        "ppl",
        "lr",
        "grad",
        "ms",
        "tok/s",
        "left",
        "bits/byte",
        "sample, likeliest: 'The",
    ):
        assert said in out, said


@pytest.mark.parametrize(
    ("fields", "stop_signal"),
    [
        (
            {
                "model": {
                    "param_dtype": "bfloat16",
                    "context": "gated",
                    "attention_every": 2,
                    "dropout": 0.1,
                    "num_iterations": 1,
                },
                "accumulate_steps": 2,
            },
            signal.SIGTERM,
        ),
        pytest.param({"model": {"dropout": 0.1}}, signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_train_interrupted_anywhere_and_resumed_is_bit_identical(
    train_config, tmp_path, fields, stop_signal
):
    """A run stopped after update 3 (between checkpoints) ends exactly as one that was not."""
    whole = train_config(run_dir=str(tmp_path / "whole"), **fields)
    parts = dataclasses.replace(whole, run_dir=str(tmp_path / "parts"))
    expected = trainer.train(whole)

    stopped = trainer.train(parts, on_record=stop_at(3, stop_signal))
    assert stopped.interrupted and 3 <= stopped.step < 8
    resumed = trainer.train(parts)
    assert not resumed.interrupted and resumed.step == 8
    assert_same(expected.params, resumed.params)
    assert_same(saved_state(whole, 8), saved_state(parts, 8))

    def losses(result):
        keep = ("step", "loss", "grad_norm", "validation_loss", "samples_seen", "gap", "best")
        return [{k: r[k] for k in keep if k in r} for r in result.history]

    assert losses(expected) == losses(resumed)


def script_losses(monkeypatch, losses):
    """The evaluation at each update of `losses` gives that loss; returns the updates evaluated."""
    at, validate, of_run = [], trainer.evaluate, trainer.Run.evaluate
    monkeypatch.setattr(
        trainer, "evaluate", lambda *args, **kw: validate(*args, **kw)._replace(loss=losses[at[-1]])
    )
    monkeypatch.setattr(
        trainer.Run,
        "evaluate",
        lambda run, state, step: (at.append(step), of_run(run, state, step)),
    )
    return at


def saved_steps(config):
    return {int(p.name) for p in (Path(config.run_dir) / "checkpoints").iterdir()}


def test_train_stops_early_says_so_again_and_goes_on_with_more_patience(
    train_config, monkeypatch, said
):
    at = script_losses(monkeypatch, {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.5, 10: 2.5})
    config = train_config(num_steps=12, eval_every=2, save_every=5, patience=2)
    result = trainer.train(config)
    assert (result.ended, result.step, at) == ("stopped early", 8, [2, 4, 6, 8])
    assert saved_steps(config) >= {4, 8}, "the best, and the state at the end"
    assert weights.read_params(config.run_dir, config.model, step="best")[0] == 4
    told = "stopped early at update 8: 2 evaluations without an improvement on 2.0000 of update 4"
    assert any(line.startswith(told) for line in said)

    said.clear()
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "compile_step", lambda *_: pytest.fail("it trains"))
        again = trainer.train(config)
    assert (again.ended, again.step) == ("stopped early", 8)
    assert any(line.startswith(told) for line in said)
    assert_same(again.params, result.params)

    longer = trainer.train(dataclasses.replace(config, patience=3))
    assert (longer.ended, longer.step) == ("stopped early", 10)


@pytest.mark.parametrize(
    "crash",
    [
        (6, "validation_loss"),  # counted, and not saved
        pytest.param((4, "validation_loss"), marks=pytest.mark.slow),  # the best, not yet saved
        pytest.param((5, "loss"), marks=pytest.mark.slow),
        pytest.param((7, "loss"), marks=pytest.mark.slow),
    ],
)
def test_train_stops_early_at_the_same_update_after_a_kill(train_config, monkeypatch, crash):
    class Killed(Exception):
        pass

    def on_record(record):
        if record["step"] == crash[0] and crash[1] in record:
            raise Killed

    config = train_config(num_steps=12, eval_every=2, save_every=5, patience=2)
    losses = {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.6}
    script_losses(monkeypatch, losses)
    with pytest.raises(Killed):
        trainer.train(config, on_record=on_record)
    result = trainer.train(config)
    assert (result.ended, result.step) == ("stopped early", 8)
    found = {r["step"]: r["validation_loss"] for r in result.history if "validation_loss" in r}
    assert found == losses


@pytest.mark.slow
def test_train_is_the_same_to_the_bit_while_all_is_watched(train_config, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    # The probe, samples and trackers change nothing that is kept.
    with monkeypatch.context() as blind:
        blind.setattr(trainer, "measure_dynamics", lambda *_, **__: {})
        plain = train_config(run_dir=str(tmp_path / "plain"))
        trainer.train(plain)
    watched = train_config(
        run_dir=str(tmp_path / "watched"),
        track=("tensorboard", "wandb", "trackio"),
        sample_every=2,
        sample_tokens=4,
    )
    trainer.train(watched)
    assert_same(saved_state(plain, 8), saved_state(watched, 8))
    seen = EventAccumulator(watched.run_dir).Reload()
    assert [point.step for point in seen.Scalars("train/loss")] == list(range(1, 9))
    assert [point.step for point in seen.Scalars("dynamics/rms_step/mean")] == [4, 8]
    assert len(seen.Tensors("samples/1")) == 4 and (tmp_path / "watched/samples/000008.md").exists()


def test_train_keeps_the_best_if_it_was_killed_before_it_noted_it(train_config, monkeypatch):
    class Killed(Exception):
        pass

    def on_record(record):
        if record["step"] == 8 and "validation_loss" in record:
            raise Killed

    config = train_config(num_steps=12, keep_last=1)
    script_losses(monkeypatch, {4: 3.0, 8: 2.0, 12: 2.5})
    with pytest.raises(Killed):
        trainer.train(config, on_record=on_record)
    assert weights.read_params(config.run_dir, config.model, step="best")[0] == 4
    trainer.train(config)
    assert weights.read_params(config.run_dir, config.model, step="best")[0] == 8
    assert saved_steps(config) == {8, 12}


def test_train_goes_on_if_a_sample_or_the_probe_fails(train_config, monkeypatch, said):
    for name in ("make_samples", "measure_dynamics"):
        monkeypatch.setattr(trainer, name, lambda *_, **__: 1 / 0)
    result = trainer.train(train_config(num_steps=4, sample_every=2, sample_tokens=4))
    assert result.ended == "complete"
    assert "WARNING: the samples at update 2 failed (ZeroDivisionError: division by zero)" in said
    assert any(line.startswith("WARNING: the integrator's dynamics at update 4") for line in said)


def test_train_warns_of_patience_that_cannot_act(train_config, monkeypatch, said):
    monkeypatch.setattr(trainer, "compile_steps", lambda *_: 1 / 0)
    for patience, warned in ((2, True), (1, False)):
        said.clear()
        with pytest.raises(ZeroDivisionError):
            trainer.train(train_config(num_steps=8, eval_every=4, patience=patience))
        assert any("patience=2 cannot stop this run" in line for line in said) == warned


def test_train_refuses_a_prompt_that_cannot_be_continued_before_it_computes(train_config):
    config = train_config(
        model={"context": "attention"},
        sample_every=2,
        sample_tokens=8,
        sample_prompts=("fine", "x" * 30),
    )
    with pytest.raises(
        InputError, match=r"sample_tokens=8.*38 tokens, beyond model.max_seq_len=32"
    ):
        trainer.train(config)
    with pytest.raises(InputError, match="sample_prompts.*cannot be encoded"):
        trainer.train(dataclasses.replace(config, sample_prompts=("\udcff",)))
    assert not Path(config.run_dir).exists()


def test_train_stopped_in_one_phase_and_resumed_into_another_is_bit_identical(
    train_config, tmp_path, text_file, said, monkeypatch
):
    """The second phase has longer sequences and other sources."""
    paths = (str(text_file), str(tmp_path / "more.txt"))
    (tmp_path / "more.txt").write_text(text_file.read_text()[::-1])
    phases = (Phase(share=0.5, weights=(1, 0), seq_len=16), Phase(share=0.5, weights=(1, 3)))
    whole = train_config(
        run_dir=str(tmp_path / "whole"),
        model={"num_layers": 1, "num_iterations": 1},
        data={"paths": paths, "phases": phases, "validation_fraction": 0.0},
        save_every=0,
    )
    parts = dataclasses.replace(whole, run_dir=str(tmp_path / "parts"))
    asked, compile_step = [], trainer.compile_step

    def spying_compile(config, *args):
        asked.append((config.data.seq_len, any(line.startswith("update") for line in said)))
        return compile_step(config, *args)

    monkeypatch.setattr(trainer, "compile_step", spying_compile)
    expected = trainer.train(whole)
    assert asked == [(16, False), (32, False)], "before the first update"
    assert [r["tokens"] for r in expected.history] == [128, 256, 384, 512, 768, 1024, 1280, 1536]

    stopped = trainer.train(parts, on_record=stop_at(2))
    assert stopped.interrupted and stopped.step < 4
    resumed = trainer.train(parts)
    assert_same(expected.params, resumed.params)
    assert any(line.startswith("phase 2 of 2 (0.5:1,3): updates 5 to 8") for line in said)
    assert said.count("update 5/8  phase 2 of 2 (0.5:1,3) begins") == 2
    changed = with_fields(parts, {"data.phases": phases[::-1], "num_steps": 12})
    with pytest.raises(InputError, match="phase 1 is 0.5:1,3, but it is over .* 0.5@16:1,0"):
        trainer.train(changed)
    assert read_config(parts.run_dir) == parts


def test_train_leaves_the_checkpoint_alone_on_a_signal_while_restoring(train_config, monkeypatch):
    config = train_config(num_steps=4)
    trainer.train(config)
    folder = Path(config.run_dir)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    read = checkpoint.ocp.checkpointables_metadata

    def interrupted(*args):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException as error:  # as Orbax's event loop does
            raise OSError("cannot be read") from error
        return read(*args)

    monkeypatch.setattr(checkpoint.ocp, "checkpointables_metadata", interrupted)
    with pytest.raises(Stopped):
        trainer.train(dataclasses.replace(config, num_steps=8))
    after = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert {p for p in before if before[p] != after.get(p)} <= {
        folder / "config.json",
        folder / "env.json",
    }


def test_train_changes_nothing_in_a_finished_run(train_config, capsys):
    config = train_config()
    first = trainer.train(config)
    assert f"complete: update 8 is saved in {config.run_dir}" in capsys.readouterr().out
    assert "Array" not in repr(first) and "Array" not in repr(first.model)  # in a notebook
    again = trainer.train(with_fields(config, {"optim.learning_rate": 1e-3}))
    assert read_config(config.run_dir) == config, "as it was trained"
    assert "complete" in capsys.readouterr().out
    assert_same(first.params, again.params)
    assert again.history == first.history


def test_train_resumes_a_finished_run_for_longer(train_config, capsys):
    trainer.train(train_config())
    capsys.readouterr()
    longer = trainer.train(train_config(num_steps=12))
    out = capsys.readouterr().out
    assert "resuming from update 8" in out and "num_steps 8 -> 12" in out
    assert "the learning rate at update 9 is 2.85e-03; by the config of the last start" in out
    assert longer.step == 12 and len([r for r in longer.history if "loss" in r]) == 12


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": {"d_model": 32}}, ("model.d_model", "32", "16")),
        pytest.param(
            {"model": {"num_iterations": 2}},
            ("model.num_iterations", "2", "3"),
            marks=pytest.mark.slow,
        ),
        ({"data": {"tokenizer": "bpe:280"}}, ("data.tokenizer", "bpe:280", "bytes")),
    ],
)
def test_train_refuses_another_model_or_tokenizer_before_it_touches_anything(
    train_config, change, named
):
    config = train_config(num_steps=4)
    trainer.train(config)
    before = {p: p.read_bytes() for p in Path(config.run_dir).rglob("*") if p.is_file()}
    with pytest.raises(InputError) as error:
        trainer.train(train_config(num_steps=4, **change))
    assert all(name in str(error.value) for name in named)
    assert before == {p: p.read_bytes() for p in Path(config.run_dir).rglob("*") if p.is_file()}


def test_train_init_from_takes_the_weights_and_nothing_else(train_config, tmp_path):
    first = trainer.train(train_config(num_steps=4))
    config = train_config(
        run_dir=str(tmp_path / "second"), init_from=str(tmp_path / "run"), num_steps=4, eval_every=0
    )
    config = dataclasses.replace(
        config, optim=dataclasses.replace(config.optim, learning_rate=1e-30, warmup_steps=0)
    )
    second = trainer.train(config)
    assert second.step == 4  # counted from 0 again
    with pytest.raises(InputError, match="init_from=elsewhere, but the run in .* exists"):
        trainer.train(dataclasses.replace(config, init_from="elsewhere", num_steps=5))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), first.params, second.params
    )


def test_train_init_from_refuses_weights_of_another_tokenizer(train_config, tmp_path):
    trainer.train(train_config(num_steps=4))
    other = train_config(
        run_dir=str(tmp_path / "second"),
        init_from=str(tmp_path / "run"),
        data={"tokenizer": "bpe:280"},
    )
    with pytest.raises(InputError, match="data.tokenizer=bpe:280.*bytes"):
        trainer.train(other)
    with pytest.raises(InputError, match="nowhere: not a run directory"):
        trainer.train(dataclasses.replace(other, init_from="nowhere"))


@pytest.fixture
def stalling(monkeypatch):
    """Makes reading hang after 40 samples: batches of 8, so after update 5."""
    released, pool = threading.Event(), batches.ThreadPool
    read = batches.Windows.__getitem__
    calls = itertools.count(1)

    def hang(self, index):
        if next(calls) > 40:
            released.wait()
        return read(self, index)

    with monkeypatch.context() as patched:
        patched.setattr(batches.Windows, "__getitem__", hang)
        patched.setattr(batches, "ThreadPool", lambda _: pool(1))  # one thread reads in order
        yield
        released.set()


def test_train_saves_and_ends_on_a_signal_while_it_waits_for_input(
    train_config, stalling, monkeypatch
):
    config = train_config(save_every=0, eval_every=0)
    next_batch, came = Reader.next, []

    def terminate_once_nothing_comes(self, seconds):
        try:
            came.append(next_batch(self, seconds))
            return came[-1]
        except TimeoutError:
            if came:
                os.kill(os.getpid(), signal.SIGTERM)
            raise

    monkeypatch.setattr(Reader, "next", terminate_once_nothing_comes)
    result = trainer.train(config)
    assert result.interrupted and saved_steps(config) == {result.step} and 1 <= result.step <= 5
    assert [r["step"] for r in result.history if "loss" in r] == list(range(1, result.step + 1))


def test_train_saves_and_ends_when_input_does_not_come_within_the_limit(
    train_config, stalling, capfd
):
    config = train_config(save_every=0, eval_every=0, stall_limit=4.0)
    with pytest.raises(Stalled, match="waiting for input, the limit being stall_limit=4; update"):
        trainer.train(config)
    (step,) = saved_steps(config)
    assert 1 <= step <= 5
    err = capfd.readouterr().err
    assert "WARNING: no progress for" in err and "in hang" in err, "the stack of the reader"


def test_train_ends_a_diverging_run_with_a_message_and_good_weights(train_config, monkeypatch):
    config = train_config(
        model={"num_layers": 1, "num_iterations": 1}, max_nonfinite_steps=3, num_steps=20
    )

    def break_after(params, batch, key, *, config):
        loss = loss_fn(params, batch, key, config=config)
        moved = jnp.abs(params["final_norm_scale"] - 1).max() > 1e-3  # from the second update on
        return jnp.where(moved, jnp.nan, loss)

    monkeypatch.setattr("inl_jax.training.step.loss_fn", break_after)
    with pytest.raises(trainer.Diverged, match="3 updates in a row"):
        trainer.train(config)
    _, params = weights.read_params(config.run_dir, config.model)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_advice_of_a_diverged_run_works(train_config, monkeypatch):
    """A finite learning rate may ruin the weights; the last good checkpoint stays."""
    config = train_config(max_nonfinite_steps=2, num_steps=40, save_every=2, eval_every=0)
    rates = trainer.learning_rates

    def ruin(optim, num_steps):
        found = rates(optim, num_steps).copy()
        if optim.learning_rate == config.optim.learning_rate:
            found[14:] = 1e37
        return found

    monkeypatch.setattr(trainer, "learning_rates", ruin)
    with pytest.raises(trainer.Diverged) as error:
        trainer.train(config)
    good = re.search(r"the last good checkpoint in .* is update (\d+): ", str(error.value))
    assert int(good[1]) in (12, 14) and int(good[1]) in saved_steps(config)
    if remove := re.search("run `(.*)`, then", str(error.value)):
        subprocess.run(shlex.split(remove[1]), check=True)
    rate = float(re.search(r"add --optim.learning_rate (\S+) to the same", str(error.value))[1])
    lower = with_fields(config, {"optim.learning_rate": rate, "num_steps": 16, "save_every": 0})
    result = trainer.train(lower)
    assert result.step == 16
    losses = [r["loss"] for r in result.history if "loss" in r]
    assert len(losses) == 16 and losses[-1] < losses[0]


def test_train_goes_on_if_an_evaluation_fails(train_config, monkeypatch, said):
    def fail(*args, **fields):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(trainer, "evaluate", fail)
    result = trainer.train(train_config(num_steps=4, eval_every=2, patience=1))
    assert result.ended == "complete"
    line = "WARNING: the evaluation at update 2 failed (JaxRuntimeError: RESOURCE_EXHAUSTED: Out of"
    assert sum(told.startswith(line) for told in said) == 1


@pytest.mark.slow  # its halves, resuming and splitting, are tested by default
def test_train_resumes_with_another_number_of_micro_batches(train_config):
    """Between updates the accumulator is empty, so any number of micro-batches may resume a run."""
    ends = []
    for splits in ((2, 4), (4, 1)):
        run_dir = f"{train_config().run_dir}-{splits[1]}"
        for hook, k in zip((stop_at(3), None), splits, strict=True):
            config = train_config(run_dir=run_dir, accumulate_steps=k)
            result = trainer.train(config, on_record=hook)
        assert result.step == 8 and not result.interrupted
        ends.append(result.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), *ends)


def test_train_refuses_a_run_directory_in_use(train_config):
    config = train_config()
    with locked(config.run_dir), pytest.raises(InputError, match="another process"):
        trainer.train(config)


def test_train_leaves_the_config_as_it_was_if_restoring_fails(train_config, monkeypatch):
    config = train_config(num_steps=4)
    trainer.train(config)
    before = (Path(config.run_dir) / "config.json").read_text()
    monkeypatch.setattr(trainer.Checkpoints, "restore", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train(dataclasses.replace(config, num_steps=9))
    assert (Path(config.run_dir) / "config.json").read_text() == before


def test_count_steps_counts_epochs_in_samples_at_any_batch_size(train_config):
    fields = dict(num_steps=0, num_epochs=0.1, optim={"warmup_steps": 0})
    config = train_config(**fields, batch_size=8)
    corpus = prepare(config.data)
    windows = (corpus.sources[0].train_tokens - 1) // 32
    whole = trainer.count_steps(config, corpus)
    assert whole == int(0.1 * windows) // 8
    for step in range(whole + 1):
        assert trainer.count_steps(config, corpus, step=step, position=8 * step) == whole
    smaller = dataclasses.replace(config, batch_size=2)
    steps = trainer.count_steps(smaller, corpus, step=5, position=40)
    assert 40 + 2 * (steps - 5) in (int(0.1 * windows), int(0.1 * windows) - 1)


def test_run_fetches_metrics_one_update_late(train_config, monkeypatch):
    """The next update is dispatched before the results of this one are waited for."""
    events = []
    compile_step, look_at = trainer.compile_step, trainer.Run.look_at

    def spying_compile(*args):
        step_fn = compile_step(*args)
        return lambda *inputs: (events.append("dispatch"), step_fn(*inputs))[1]

    def spying_look(self, state, step, metrics):
        events.append(step)
        look_at(self, state, step, metrics)

    monkeypatch.setattr(trainer, "compile_step", spying_compile)
    monkeypatch.setattr(trainer.Run, "look_at", spying_look)
    trainer.train(train_config(num_steps=4, save_every=0, eval_every=0))
    assert events == ["dispatch", "dispatch", 1, "dispatch", 2, "dispatch", 3, 4]


def test_run_fetches_nothing_else_between_updates(train_config, monkeypatch):
    """The host reads from the device the results of one update earlier, and nothing more."""
    events, of_update = [], {}
    compile_step, array_type = trainer.compile_step, type(jnp.zeros(()))
    value, wait = array_type._value, array_type.block_until_ready

    def spying_compile(*args):
        step_fn = compile_step(*args)

        def spying_step(*inputs):
            state, results = step_fn(*inputs)
            update = events.count("dispatch") + 1
            of_update.update({id(array): (update, array) for array in results.values()})
            events.append("dispatch")
            return state, results

        return spying_step

    def note(array):
        if threading.current_thread() is threading.main_thread():
            events.append(of_update.get(id(array), ("something else",))[0])

    monkeypatch.setattr(trainer, "compile_step", spying_compile)
    monkeypatch.setattr(array_type, "_value", property(lambda a: (note(a), value.fget(a))[1]))
    monkeypatch.setattr(array_type, "block_until_ready", lambda a: (note(a), wait(a))[1])
    monkeypatch.setattr(jax, "block_until_ready", lambda tree: (events.append("wait"), tree)[1])
    trainer.train(train_config(num_steps=5, save_every=0, eval_every=0))
    first, *between = [i for i, event in enumerate(events) if event == "dispatch"]
    assert len(between) == 4
    fetched = [set(events[i + 1 : j]) for i, j in itertools.pairwise([first, *between])]
    assert fetched == [set(), {1}, {2}, {3}]


@pytest.mark.parametrize(("read_seconds", "share"), [(0.0, 0.0), (3.0, 0.75)])
def test_run_measures_and_shows_the_wait_for_data(
    train_config, monkeypatch, capsys, read_seconds, share
):
    """On a clock of our own: a second for each update, and `read_seconds` for each batch."""
    clock = [0.0]
    compile_step, inputs = trainer.compile_step, trainer.Watchdog.inputs

    def slow_step(*args):
        step_fn = compile_step(*args)
        return lambda *inputs: (clock.__setitem__(0, clock[0] + 1), step_fn(*inputs))[1]

    def slow_inputs(*args):
        for batch in inputs(*args):
            clock[0] += read_seconds
            yield batch

    monkeypatch.setattr(step_timer, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(trainer, "compile_step", slow_step)
    monkeypatch.setattr(trainer.Watchdog, "inputs", slow_inputs)
    config = train_config(num_steps=6, log_every=2, save_every=0, eval_every=0)
    waits = [r["input_wait"] for r in trainer.train(config).history if "loss" in r]
    assert waits == [share] * 4
    assert ("75% waiting for data" in capsys.readouterr().out) == (share > 0)


def test_train_fits_the_config_and_makes_the_layout_once(train_config, monkeypatch):
    calls = []

    def spy(module, name):
        function = getattr(module, name)
        note = lambda *args, **kwargs: (calls.append(name), function(*args, **kwargs))[1]  # noqa: E731
        monkeypatch.setattr(module, name, note)

    spy(preflight, "make_layout")
    spy(preflight, "fit_to_mesh")
    spy(state, "param_shardings")
    config = train_config(accumulate_steps=8, model={"remat": "auto"}, mesh=MeshConfig(data=2))
    monkeypatch.setattr(
        trainer, "compile_step", lambda fitted, *_: 1 / (fitted.accumulate_steps - 4)
    )
    with pytest.raises(ZeroDivisionError):  # four micro-batches of two rows
        trainer.train(config)
    assert sorted(calls) == ["fit_to_mesh", "make_layout", "param_shardings"]
    assert read_config(config.run_dir) == config, "the asked config is what is recorded"
    (start,) = json.loads((Path(config.run_dir) / "env.json").read_text())["starts"]
    assert start["recipe"].pop("why").startswith("accumulate_steps 8 -> 4, ")
    assert start["recipe"] == {"remat": "all_but_integrator", "micro_batches": 4}


def run_script(name, *args, **kwargs):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / name), *args]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs
    )


def write_config(config, path):
    path.write_text(
        f"from inl_jax.config_file import from_json\nconfig = from_json({to_json(config)!r})\n"
    )
    return ["--config", str(path)]


def wait_for(process, run_dir, step):
    """Returns when the run has logged `step`."""
    until = time.monotonic() + 240  # on a busy machine too
    while time.monotonic() < until:
        records = read_metrics(run_dir) if Path(run_dir).exists() else []
        if any(r["step"] >= step for r in records):
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    pytest.fail("the run did not get there")


@pytest.mark.slow  # by default test_processes.py kills, and the test before compares bits
def test_train_killed_and_terminated_resumes_to_the_same_end(train_config, tmp_path):
    """kill -9 between checkpoints, then SIGTERM, then to the end: equal to one straight run."""
    settings = dict(num_steps=700, log_every=20, save_every=100, eval_every=0, eval_sequences=4)
    parts = train_config(run_dir=str(tmp_path / "parts"), **settings)
    command = write_config(parts, tmp_path / "config.py")

    process = run_script("train.py", *command)
    wait_for(process, parts.run_dir, 160)
    process.kill()
    process.communicate()

    process = run_script("train.py", *command)
    wait_for(process, parts.run_dir, 340)
    process.send_signal(signal.SIGTERM)
    out = process.communicate()[0]
    assert process.returncode == EXIT_INTERRUPTED, out
    assert "resuming from update" in out
    assert f"compiled programs are kept in {os.environ['JAX_COMPILATION_CACHE_DIR']}\n" in out
    reached = max(int(p.name) for p in (tmp_path / "parts" / "checkpoints").iterdir())
    assert f"stopped at update {reached} as asked, and saved" in out

    process = run_script("train.py", *command)
    out = process.communicate()[0]
    assert process.returncode == 0 and f"resuming from update {reached} in" in out, out

    whole = run_script("train.py", *command, "--run_dir", str(tmp_path / "whole"))
    out = whole.communicate()[0]
    assert whole.returncode == 0, out
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    assert_same(
        saved_state(dataclasses.replace(train_config(), run_dir=str(parts)), 700),
        saved_state(dataclasses.replace(train_config(), run_dir=str(whole)), 700),
    )
    losses = [
        [(r["step"], r["loss"]) for r in read_metrics(d) if "loss" in r] for d in (parts, whole)
    ]
    assert losses[0] == losses[1] or set(losses[1]) <= set(losses[0])


def test_train_calls_on_record_with_each_record_and_lets_it_end_the_run(train_config):
    class Enough(Exception):
        pass

    heard = []

    def on_record(record):
        heard.append(record)
        if record["step"] == 5:
            raise Enough

    config = train_config()
    with pytest.raises(Enough):
        trainer.train(config, on_record=on_record)
    assert heard == read_metrics(config.run_dir)
    assert [r["step"] for r in heard if "loss" in r] == [1, 2, 3, 4, 5]
    resumed = trainer.train(config)  # from the checkpoint of update 4
    steps = [r["step"] for r in resumed.history if "loss" in r]
    assert steps == list(range(1, 9)), "the abandoned update 5 stands once"


@pytest.mark.slow  # by default the test before, and those of the log
def test_train_marks_the_branch_that_it_abandons(train_config):
    """A run that ended before its first save starts again; its history is that of one run."""

    def end_at_6(record):
        assert record["step"] < 6

    config = train_config(num_steps=8, log_every=1, eval_every=0, save_every=0)
    with pytest.raises(AssertionError):
        trainer.train(config, on_record=end_at_6)
    assert [r["step"] for r in read_metrics(config.run_dir)] == [1, 2, 3, 4, 5, 6]
    again = trainer.train(dataclasses.replace(config, num_steps=4))
    steps = [r["step"] for r in again.history if "loss" in r]
    assert steps == [1, 2, 3, 4] and max(r["step"] for r in again.history) == 4
    assert again.history == read_metrics(config.run_dir)


def test_train_reads_a_dataset_of_the_hub_at_one_commit(train_config, monkeypatch, tmp_path):
    def prepare_data(config, kept):
        raise InputError(config.data.paths[0])

    Hub(monkeypatch, tmp_path)
    monkeypatch.setattr(trainer, "prepare_data", prepare_data)
    with pytest.raises(InputError, match=f"^hf:owner/name#{COMMITS['main']}$"):
        trainer.train(train_config(data={"paths": ("hf:owner/name",)}))


def test_run_says_if_its_evaluations_were_on_another_text(said):
    past = [{"step": 4, "validation_loss": 2.0, "basis": "a"}]
    checkpoints = SimpleNamespace(steps=lambda: {4}, is_best=lambda *_, **__: False)
    for basis, lines in (("a", 0), ("b", 1)):
        run = SimpleNamespace(evaluations=past, basis=basis, checkpoints=checkpoints)
        trainer.Run.recover_best(run)
        assert len(said) == lines
