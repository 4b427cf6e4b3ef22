import math
import pickle
import typing
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from inl_jax.checks import InputError
from inl_jax.config import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    field_types,
    with_fields,
)
from inl_jax.config_file import from_json, to_json

HUGE = 10**5000  # Python refuses to write out so many digits


@pytest.mark.parametrize(
    "message", ["a\nb\r\x1b[31mc\u2028", "x" * 10**6, "\ud800", "a\0", "one line, 猫 °"]
)
def test_input_error_is_one_line_that_a_terminal_can_show(message):
    error = InputError(message)
    assert str(error).isprintable() and len(str(error)) < 1200
    assert str(pickle.loads(pickle.dumps(error))) == str(InputError(str(error))) == str(error)
    if message.isprintable() and len(message) < 1000:
        assert str(error) == message


@pytest.mark.parametrize(
    "fields, plain",
    [
        ({"batch_size": np.int64(8)}, 8),
        ({"optim.learning_rate": np.float32(0.5)}, 0.5),
        ({"optim.learning_rate": Fraction(1, 2)}, 0.5),
        ({"num_epochs": 2, "num_steps": 0}, 2.0),
        ({"mesh.fsdp": np.int32(4)}, 4),
        ({"run_dir": Path("runs/a")}, "runs/a"),
        ({"data.tokenizer": Path("a/tokenizer.json")}, "a/tokenizer.json"),
        ({"data.paths": [Path("a"), "b"]}, ("a", "b")),
        ({"data.weights": [np.float64(2)]}, (2.0,)),
    ],
)
def test_values_that_are_as_good_become_plain_python(fields, plain):
    config = with_fields(TrainConfig(), fields)
    section, _, name = next(iter(fields)).rpartition(".")
    value = getattr(getattr(config, section) if section else config, name)
    assert value == plain and type(value) is type(plain)
    assert from_json(to_json(config)) == config


WRONG = [None, b"x", 1j, True, HUGE, -HUGE, {}, object(), np.array([1, 2]), ((None,),)]


@pytest.mark.parametrize("name", field_types())
def test_every_field_refuses_values_of_another_type_in_one_line(name):
    for value in WRONG:
        with pytest.raises(InputError) as caught:
            with_fields(TrainConfig(), {name: value})
        message = str(caught.value)
        assert name.split(".")[-1] in message and message.isprintable() and len(message) < 1200


# These are bounded by another field, or mean the same as less.
UNBOUNDED = {"data.max_documents", "accumulate_steps", "optim.warmup_steps", "data.seq_len"}


@pytest.mark.parametrize(
    "name", [name for name, kind in field_types().items() if int in (kind, *typing.get_args(kind))]
)
def test_every_whole_number_has_bounds(name):
    for value in (8.0, "8", -1, 2**63, *(() if name in UNBOUNDED else (2**32, 10**12))):
        with pytest.raises(InputError, match=name.split(".")[-1]):
            with_fields(TrainConfig(), {name: value})


@pytest.mark.parametrize(
    "make",
    [
        lambda: TrainConfig(model=None),
        lambda: TrainConfig(data={}),
        lambda: DataConfig(weights=(None,)),
        lambda: DataConfig(weights=((1.0,),)),
        lambda: DataConfig(paths="a.txt"),
        lambda: OptimConfig(eps=1e-300),
        lambda: OptimConfig(learning_rate=HUGE),
        lambda: ModelConfig(dt=math.inf),
        lambda: MeshConfig(data=HUGE),
        lambda: TrainConfig(model=type("Mine", (ModelConfig,), {})()),
    ],
)
def test_sections_refuse_what_they_cannot_hold(make):
    with pytest.raises(InputError) as caught:
        make()
    assert str(caught.value).isprintable()
