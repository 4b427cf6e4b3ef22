import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_same, mesh_of
from exported_dir import write_arrays, write_config, write_exported
from lively import lively_params
from safetensors.numpy import load_file, save_file

from inl_jax.config import InputError
from inl_jax.interop.exported_weights import INDEX_NAME, WEIGHTS_NAME, is_exported, open_exported
from inl_jax.parallel.sharding import param_shardings

SECOND = "model-00002-of-00003.safetensors"
NORM = "model.norm.weight"


def read(directory, mesh=None, param_dtype=None):
    found = open_exported(directory)
    shardings = param_shardings(mesh or mesh_of(), found.model)
    return found.read(param_dtype or found.model.param_dtype, shardings)


@pytest.fixture
def config(model_config):
    return model_config(context="decay")


@pytest.fixture
def exported(tmp_path, config):
    """An exported model in one file."""
    return write_exported(tmp_path / "exported", lively_params(config), config)


@pytest.mark.parametrize(
    "fields, how",
    [
        ({"context": "mean", "kappa": float("inf")}, {"head": True}),
        ({"context": "decay", "param_dtype": "bfloat16"}, {"shards": 3, "head": True}),
        ({"context": "attention", "num_iterations": 0}, {"shards": 2}),
        pytest.param({"context": "gated", "attention_every": 2}, {}, marks=pytest.mark.slow),
    ],
    ids=[
        *["mean with a head", "decay in bfloat16 in shards", "attention without integrator"],
        "gated and attention",
    ],
)
def test_exported_model_comes_back_bit_for_bit(tmp_path, model_config, fields, how):
    config = model_config(**fields)
    params = lively_params(config)
    directory = write_exported(tmp_path / "exported", params, config, **how)
    found = open_exported(directory)
    assert is_exported(directory)
    assert found.model == dataclasses.replace(config, remat="block")  # computed anew, not stored
    assert f"in {how.get('shards', 1)} file" in str(found)
    assert_same(read(directory), params)


def test_weights_go_into_the_shards_of_a_mesh(exported, config):
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    found = read(exported, mesh)
    assert_same(found, lively_params(config))
    wanted = param_shardings(mesh, config)
    assert jax.tree.map(lambda leaf: leaf.sharding, found) == wanted
    assert not found["embedding"].is_fully_replicated


def test_other_types_become_the_asked_one(exported, config):
    def rounded(*types):
        return jax.tree.map(
            lambda leaf: functools.reduce(np.ndarray.astype, types, np.asarray(leaf)),
            lively_params(config),
        )

    assert_same(read(exported, param_dtype="bfloat16"), rounded(jnp.bfloat16))
    named = load_file(exported / WEIGHTS_NAME)
    write_arrays(exported, {name: array.astype(np.float16) for name, array in named.items()})
    assert open_exported(exported).model.param_dtype == "float32"
    assert_same(read(exported), rounded(np.float16, np.float32))


def change_config(**fields):
    def change(directory):
        found = json.loads((directory / "config.json").read_text())
        write_config(directory, found | fields)

    return change


def change_arrays(change):
    def rewrite(directory):
        named = load_file(directory / WEIGHTS_NAME)
        change(named)
        save_file(named, directory / WEIGHTS_NAME)

    return rewrite


def in_shards(change=lambda places: None, *, remove=()):
    """As three shards, with a changed index, and without some files."""

    def rewrite(directory):
        named = load_file(directory / WEIGHTS_NAME)
        (directory / WEIGHTS_NAME).unlink()
        write_arrays(directory, named, shards=3)
        index = json.loads((directory / INDEX_NAME).read_text())
        change(index["weight_map"])
        (directory / INDEX_NAME).write_text(json.dumps(index))
        for name in remove:
            (directory / name).unlink()

    return rewrite


def truncate(directory):
    path = directory / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-100])


def as_pickle(directory):
    (directory / WEIGHTS_NAME).rename(directory / "pytorch_model.bin")


def as_adapter(directory):
    (directory / "config.json").rename(directory / "adapter_config.json")
    (directory / WEIGHTS_NAME).rename(directory / "adapter_model.safetensors")


POINTER = "version https://git-lfs.github.com/spec/v1\n"
DAMAGES = {
    "another model": (change_config(model_type="llama"), "model_type is 'llama'"),
    "other config": (change_config(num_layers=1), "has no place for model.layers.1"),
    "more layers": (change_config(num_layers=3), "lacks model.layers.2.* and 24 more"),
    "other width": (change_config(d_ff=48), r"_proj.* has shape \(16, 32\), .* wants \(16, 48\)"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json: no such file"),
    "damaged config": (lambda d: (d / "config.json").write_text('{"a'), "config.json: cannot be"),
    "config that is a list": (lambda d: write_config(d, []), "config.json: holds no JSON object"),
    "missing": (change_arrays(lambda named: named.pop(NORM)), f"lacks {NORM}; export"),
    "left over": (change_arrays(lambda n: n.update(odd=np.ones(2))), "has no place for odd;"),
    "integers": (change_arrays(lambda n: n.update({NORM: np.ones(16, int)})), "is of type I64"),
    "NaN": (change_arrays(lambda n: n[NORM].fill(np.nan)), f"{NORM} holds NaN or infinity"),
    "untied head": (
        change_arrays(lambda n: n.update({"lm_head.weight": n["model.embed_tokens.weight"] + 1})),
        "lm_head.weight differs from model.embed_tokens.weight",
    ),
    "truncated": (truncate, f"{WEIGHTS_NAME}: damaged .*not fully covered"),
    "pointer": (lambda d: (d / WEIGHTS_NAME).write_text(POINTER), f"{WEIGHTS_NAME}: a pointer of"),
    "pickle": (as_pickle, "pytorch_model.bin: a pickle, which could run code"),
    "adapter": (as_adapter, "holds an adapter of PEFT"),
    "no weights": (lambda d: (d / WEIGHTS_NAME).unlink(), "has no model.safetensors"),
    "missing shard": (in_shards(remove=[SECOND]), f"{SECOND}: missing"),
    "path out of the directory": (
        in_shards(lambda places: places.update({NORM: f"../{SECOND}"})),
        "model.norm.weight is in '../.*no file beside it",
    ),
    "index of another model": (
        in_shards(lambda places: places.update({NORM: places["model.embed_tokens.weight"]})),
        "model.norm.weight is not where the index says",
    ),
    "short index": (
        in_shards(lambda places: places.pop(NORM)),
        "model.norm.weight is not where the index says",
    ),
    "no index": (lambda d: (d / WEIGHTS_NAME).rename(d / SECOND), f"no {INDEX_NAME}"),
}


@pytest.mark.parametrize("damage, message", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named_in_a_line(exported, damage, message):
    damage(exported)
    assert is_exported(exported)
    with pytest.raises(InputError, match=message) as error:
        read(exported)
    assert str(error.value).startswith(str(exported))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"context": "mean", "kappa": float("inf")},
        {"context": "decay"},
        {"context": "attention", "num_iterations": 0},
        {"context": "gated", "attention_every": 2},
    ],
    ids=["mean", "decay", "attention", "gated and attention"],
)
def test_model_that_transformers_changed_and_saved_comes_back(tmp_path, model_config, fields):
    modeling = pytest.importorskip("inl_jax.interop.exported.modeling_inl")  # needs transformers
    import torch

    config = model_config(**fields)
    params = lively_params(config)
    write_exported(tmp_path / "exported", params, config)
    theirs = modeling.InlForCausalLM.from_pretrained(tmp_path / "exported")
    with torch.no_grad():
        theirs.model.norm.weight += 1
    theirs.save_pretrained(tmp_path / "saved", max_shard_size="8KB")
    theirs.bfloat16().save_pretrained(tmp_path / "narrow")
    saved = open_exported(tmp_path / "saved")
    assert saved.model == dataclasses.replace(config, remat="block") and "1 file" not in str(saved)
    changed = params | {"final_norm_scale": np.asarray(params["final_norm_scale"]) + 1}
    assert_same(read(tmp_path / "saved"), changed)
    narrow = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.bfloat16), changed)
    assert_same(read(tmp_path / "narrow"), narrow)


def test_files_of_a_trainer_beside_the_weights_are_left_alone(exported, config):
    for name in ("optimizer.pt", "training_args.bin", "rng_state.pth"):
        (exported / name).write_bytes(b"\x80\x04")
    assert_same(read(exported), lively_params(config))


def test_runs_and_other_directories_are_no_exported_models(exported, tmp_path):
    (tmp_path / "empty").mkdir()
    for path in ("empty", "nowhere", "exported/config.json"):
        assert not is_exported(tmp_path / path)
    (exported / "checkpoints" / "4").mkdir(parents=True)
    assert not is_exported(exported)
