import dataclasses
import math

import pytest

from inl_jax.config import InputError, ModelConfig, TrainConfig, with_fields
from inl_jax.config_file import differences, from_json, override, to_json


def test_config_goes_round_through_json():
    config = override(
        TrainConfig(model=ModelConfig(kappa=math.inf)),
        ["--data.paths", "a", "b", "--data.weights", "1", "2", "--mesh.data", "2"],
    )
    assert from_json(to_json(config)) == config
    with pytest.raises(InputError, match="model.colour"):
        from_json('{"model": {"colour": 1}}')


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
