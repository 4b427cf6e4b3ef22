import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inl_jax.config import InputError, ModelConfig, TrainConfig, field_types, with_fields
from inl_jax.config_file import differences, from_json, override, to_json


def test_config_goes_round_through_json():
    config = override(
        TrainConfig(model=ModelConfig(kappa=math.inf)),
        ["--data.paths", "a", "b", "--data.weights", "1", "2", "--mesh.data", "2"],
    )
    assert from_json(to_json(config)) == config
    with pytest.raises(InputError, match="model.colour"):
        from_json('{"model": {"colour": 1}}')


def test_config_with_an_infinite_number_is_json(tmp_path):
    config = with_fields(TrainConfig(), {"model.kappa": math.inf, "optim.clip_norm": math.inf})
    text = to_json(config)
    assert json.loads(text, parse_constant=pytest.fail)["model"]["kappa"] == "inf"
    assert from_json(text) == config == from_json(text.replace('"inf"', "Infinity"))  # as it was


@pytest.mark.parametrize(
    "text",
    [
        '{"model": {}, "seed": [1]}',
        '{"model": 3}',
        '{"model": []}',
        '{"model": null}',
        '{"model": {"kappa": "infinity"}}',
        '{"model": {}, "data": {"phases": [3]}}',
        '{"model": {}, "data": {"paths": "a"}}',
        '{"model": {}, "name": "a", "seed": 1e400}',
        "[]",
        "3",
    ],
)
def test_from_json_refuses_what_is_no_config_in_one_line(text):
    with pytest.raises(InputError) as caught:
        from_json(text)
    assert str(caught.value).isprintable()


NUMBERS = st.integers() | st.floats() | st.sampled_from([2**31, 2**32, 2**63, 10**400, -1, 1e300])
TEXTS = st.text(st.characters(codec=None)) | st.sampled_from(["inf", "nan", "1e400", "rest", "--x"])
VALUES = st.recursive(
    NUMBERS | TEXTS | st.none() | st.booleans() | st.binary() | st.complex_numbers(),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(TEXTS, inner),
)


@pytest.mark.slow
@settings(max_examples=5000, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(field_types())), VALUES, max_size=4))
def test_every_value_of_every_field_makes_a_config_or_one_line(fields):
    try:
        config = with_fields(TrainConfig(), fields)
    except InputError as error:
        assert str(error).isprintable() and len(str(error)) < 1200
    else:
        text = to_json(config)
        json.loads(text, parse_constant=pytest.fail)
        assert from_json(text) == config and override(TrainConfig(), []) == TrainConfig()


@pytest.mark.slow
@settings(max_examples=3000, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(field_types())), st.lists(TEXTS, max_size=3))))
def test_every_command_line_makes_a_config_or_one_line(flags):
    words = [word for name, values in flags for word in (f"--{name}", *values)]
    try:
        override(TrainConfig(), words)
    except InputError as error:
        assert str(error).isprintable() and len(str(error)) < 1200


def test_differences_name_dotted_fields_and_both_values():
    config = TrainConfig()
    other = dataclasses.replace(config, seed=7, model=ModelConfig(d_ff=64))
    assert list(differences(config, config)) == []
    assert list(differences(config, other)) == [("model.d_ff", 512, 64), ("seed", 0, 7)]


def test_with_fields_replaces_dotted_fields_together_and_checks_them():
    config = with_fields(TrainConfig(), {"model.max_seq_len": 64, "data.seq_len": 64, "seed": 1})
    assert list(differences(TrainConfig(), config)) == [
        ("model.max_seq_len", 256, 64),
        ("data.seq_len", 256, 64),
        ("seed", 0, 1),
    ]
    with pytest.raises(InputError, match="data.seq_len=256"):
        with_fields(TrainConfig(), {"model.max_seq_len": 64})


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"patience": 1, "eval_every": 0}, "patience=1 with eval_every=0"),
        ({"patience": 1, "data.validation_fraction": 0.0}, "patience=1 with data.validation_frac"),
        ({"min_delta": math.inf}, "min_delta=inf"),
        ({"min_delta": -0.1}, "min_delta=-0.1"),
        ({"sample_every": 5, "sample_prompts": ()}, "sample_every=5 with no sample_prompts"),
        (
            {"track": ("mlflow",)},
            "track=('mlflow',): 'mlflow': choose one of tensorboard, wandb, trackio",
        ),
        ({"optim.decay_fraction": 0.0}, "optim.decay_fraction=0.0"),
    ],
)
def test_settings_round_a_run_that_cannot_work_are_named(fields, named):
    with pytest.raises(InputError) as error:
        with_fields(TrainConfig(), fields)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_run_saved_with_one_sample_prompt_is_read_as_several():
    assert from_json('{"model": {}, "sample_prompt": "x"}').sample_prompts == ("x",)
