import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_same, mesh_of
from exported_dir import write_exported
from lively import lively_params, published_params, save_run

from inl_jax.config import InputError, with_fields
from inl_jax.config_file import override
from inl_jax.initial_weights import check_start, find_weights, kept_tokenizer, kind_of
from inl_jax.interop.published import params_to_torch
from inl_jax.parallel.sharding import param_shardings
from inl_jax.storage.run_dir import record_run
from inl_jax.tokens.tokenizer import load_tokenizer, train_bpe

BYTES = load_tokenizer("bytes")
MODEL = {"context": "mean", "kappa": float("inf")}  # which all three kinds can hold


@pytest.fixture
def config(train_config):
    return train_config(model=MODEL)


@pytest.fixture
def source(request, config, tmp_path):
    """Makes weights of a kind, by default of the model of `config`; returns their path."""

    def make(kind, tokenizer=None, of=config):
        path = tmp_path / f"old_{kind}"
        if kind == "run":
            save_run(dataclasses.replace(of, run_dir=str(path)))
            if tokenizer:
                tokenizer.save(path)
        elif kind == "exported":
            write_exported(path, lively_params(of.model), of.model, tokenizer=tokenizer)
        else:
            torch = pytest.importorskip("torch", reason="the torch extra is not installed")
            named = params_to_torch(published_params(of.model), of.model)
            torch.save({k: torch.from_numpy(np.array(v)) for k, v in named.items()}, path)
        return path

    return make


KINDS = ("run", "exported", pytest.param("published", marks=pytest.mark.slow))  # torch


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_weights_are_told_apart_and_are_checked_alike(source, config, kind, said):
    begun = dataclasses.replace(config, init_from=str(source(kind)))
    assert kind_of(Path(begun.init_from)) == kind
    check_start(begun, BYTES)
    untold = [
        f"{begun.init_from} tells neither its tokenizer nor its iterations: bytes and "
        "model.num_iterations=3 must be those of its training"
    ]
    assert said == (untold if kind == "published" else [])
    said.clear()
    other = {"model.num_iterations": 5, "model.max_seq_len": 64, "model.remat": "block"}
    check_start(with_fields(begun, other))
    changed = "" if kind == "published" else "model.num_iterations 3 -> 5"
    assert changed in " ".join(said) and "model.max_seq_len 32 -> 64" in " ".join(said)
    other = {"model.context": "decay", "model.kappa": 1.0}
    named = (
        "model.context=decay, model.kappa=1.0, but the weights in .* have model.context=mean, "
        "model.kappa=inf: add --model.context mean --model.kappa inf, or"
    )
    with pytest.raises(InputError, match=named):
        check_start(with_fields(begun, other))
    check_start(
        override(with_fields(begun, other), "--model.context mean --model.kappa inf".split())
    )
    with pytest.raises(InputError, match="^model.num_iterations=0, .*add --model.num_iter"):
        check_start(with_fields(begun, other | {"model.num_iterations": 0}))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_each_kind_go_into_the_shards_of_a_mesh(source, config, kind):
    mesh = mesh_of(fsdp=2, tensor=2)
    weights = find_weights(source(kind), config.model)
    shardings = param_shardings(mesh, config.model)
    what, params = weights.read("float32", shardings)
    assert {"run": "a run at update 1", "exported": "an exported model"}.get(kind, kind) in what
    assert params["embedding"].sharding == shardings["embedding"]
    if kind == "published":  # not to the bit: the square root of D moves
        np.testing.assert_allclose(
            params["embedding"], lively_params(config.model)["embedding"], rtol=1e-6
        )
    else:
        assert_same(params, lively_params(config.model))


@pytest.mark.parametrize("kind", [pytest.param("run", marks=pytest.mark.slow), "exported"])
def test_weights_of_layers_with_other_contexts_are_refused_by_name(source, train_config, kind):
    own = train_config(model={"context": "gated", "attention_every": 2})
    path = source(kind, of=own)
    begun = dataclasses.replace(own, init_from=str(path))
    check_start(begun, BYTES)
    _, params = find_weights(path, own.model).read("float32", param_shardings(mesh_of(), own.model))
    assert_same(params, lively_params(own.model))
    for fields, named in (
        ({"attention_every": 0}, "model.attention_every=0, .*add --model.attention_every 2,"),
        (
            {"context": "attention", "attention_every": 0},
            "model.context=attention, model.attention_every=0, .*add --model.context gated "
            "--model.attention_every 2,",
        ),
        ({"context": "decay"}, "model.context=decay, .*add --model.context gated,"),
    ):
        other = dataclasses.replace(begun, model=dataclasses.replace(own.model, **fields))
        with pytest.raises(InputError, match=f"^{named}"):
            check_start(other, BYTES)
        advice = "--model.context gated --model.attention_every 2".split()
        check_start(override(other, advice), BYTES)


@pytest.mark.parametrize("kind", ["run", "exported"])
def test_weights_of_another_tokenizer_are_refused(source, config, kind):
    path = source(kind)
    begun = dataclasses.replace(config, init_from=str(path))
    other = train_bpe(["some text, some text"] * 9, 260)
    with pytest.raises(InputError, match=f"bpe:260.* has bytes .*--data.tokenizer {path}/tok"):
        check_start(begun, other)
    check_start(begun, load_tokenizer(f"{path}/tokenizer.json"))  # the advice


@pytest.mark.parametrize("kind", ["run", "exported"])
def test_kept_tokenizer_is_that_of_the_run_or_of_its_weights(source, config, kind):
    own = train_bpe(["some text, some text"] * 9, 260)
    path = str(source(kind, own))
    asked = with_fields(config, {"data.tokenizer": "bpe:260"})
    assert kept_tokenizer(asked) is None  # there is no run
    begun = dataclasses.replace(asked, init_from=path)
    assert kept_tokenizer(begun).fingerprint == own.fingerprint
    for other in ("bpe:270", "bytes"):
        assert kept_tokenizer(with_fields(begun, {"data.tokenizer": other})) is None
    record_run(begun, own)
    shutil.rmtree(path)
    assert kept_tokenizer(begun).fingerprint == own.fingerprint  # its own by now


def test_weights_that_are_not_there_are_named(source, config, tmp_path):
    path = source("run")
    shutil.rmtree(path / "checkpoints")
    (tmp_path / "empty").mkdir()
    (tmp_path / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    exported = source("exported")
    for place, message in [
        (path, "^init_from=.*old_run: has no checkpoint"),
        (tmp_path / "nowhere", "nowhere: not a run directory"),
        (tmp_path / "empty", "empty: not a run directory"),
        (tmp_path / "pointer.pt", "pointer.pt: a pointer of Git LFS"),
        (exported / "model.safetensors", f"model.safetensors: name {exported}, which"),
    ]:
        with pytest.raises(InputError, match=message):
            check_start(dataclasses.replace(config, init_from=str(place)))
