import dataclasses
import json
import math

import pytest

from inl_jax.checks import InputError
from inl_jax.config import ModelConfig
from inl_jax.files import json_text
from inl_jax.interop import exported_config
from inl_jax.interop.exported_config import from_json_fields, to_json_fields


def test_every_field_of_a_model_is_exported_or_free():
    """A new field that changes the function must be carried, or its export refused."""
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    known = {*exported_config.FUNCTION, *exported_config.COMPUTATION, *exported_config.REFUSED}
    assert fields == known | {"param_dtype"}


@pytest.mark.parametrize(
    "fields",
    [
        {"context": "attention"},
        {"context": "mean", "kappa": math.inf},
        {"context": "gated", "attention_every": 2},
    ],
    ids=["attention", "mean", "gated, attention"],
)
def test_config_comes_back_through_json(model_config, fields):
    config = model_config(**fields, remat="block", dropout=0.1, dt=0.2)
    written = json.loads(json_text(to_json_fields(config) | {"model_type": "inl"}))
    assert from_json_fields(written, param_dtype="float32", of="config.json") == config


@pytest.mark.parametrize(
    "change, named",
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"d_model": 7}, "model.d_model=7: must be even"),
        ({"kappa": "high"}, "model.kappa='high'"),
    ],
)
def test_impossible_config_is_named(model_config, change, named):
    written = to_json_fields(model_config()) | {"model_type": "inl"} | change
    with pytest.raises(InputError, match=named) as error:
        from_json_fields(written, param_dtype="float32", of="x/config.json")
    assert str(error.value).startswith("x/config.json: ")


def test_config_of_before_attention_every_is_read(model_config):
    config = model_config(remat="block")
    written = to_json_fields(config) | {"model_type": "inl"}
    del written["attention_every"]
    assert from_json_fields(written, param_dtype="float32", of="config.json") == config


def test_missing_field_is_named(model_config):
    written = to_json_fields(model_config()) | {"model_type": "inl"}
    del written["dt"]
    with pytest.raises(InputError, match="lacks dt"):
        from_json_fields(written, param_dtype="float32", of="config.json")


def test_model_whose_tokens_stop_early_is_not_exported(model_config):
    with pytest.raises(InputError, match=r"model.tol=0.01: .*set model.tol=0"):
        to_json_fields(model_config(tol=0.01))
