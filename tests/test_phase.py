import dataclasses

import pytest

from inl_jax.config import DataConfig, InputError, Phase, TrainConfig, with_fields
from inl_jax.config_file import differences, from_json, override, to_json

GUIDE = ["--data.paths", "a", "b", "c", "--data.phases", "0.5:1,0,0", "0.3:0,1,0", "0.2:1,1,1"]
PHASES = (
    Phase(share=0.5, weights=(1, 0, 0)),
    Phase(share=0.3, weights=(0, 1, 0)),
    Phase(share=0.2, weights=(1, 1, 1)),
)


@pytest.mark.parametrize("text", ["0.5:1,0,0", "0.25@512:0,0.1", "2e+10:1", "1:1,3", "12345.5:1"])
def test_phase_is_the_text_that_it_was_read_from(text):
    assert str(Phase.parse(text)) == text
    assert Phase.parse(str(Phase.parse(text))) == Phase.parse(text)


def test_phase_keeps_every_digit_of_its_share():
    for share in (1 / 3, 0.1234567890123, 123_456_789.0):
        phase = Phase(share=share, weights=(1 / 3, 1))
        assert Phase.parse(str(phase)) == phase


def test_phases_on_a_command_line_are_those_of_a_config_file():
    assert override(TrainConfig(), GUIDE).data == DataConfig(paths=("a", "b", "c"), phases=PHASES)


def test_phases_go_round_through_json_and_are_named_as_they_are_written():
    config = override(TrainConfig(), GUIDE)
    assert from_json(to_json(config)) == config
    other = dataclasses.replace(PHASES[0], seq_len=64)
    changed = with_fields(config, {"data.phases": (other, *PHASES[1:])})
    assert list(differences(config, changed)) == [
        ("data.phases", "0.5:1,0,0 0.3:0,1,0 0.2:1,1,1", "0.5@64:1,0,0 0.3:0,1,0 0.2:1,1,1")
    ]


def test_help_shows_how_phases_are_spelled(inl):
    shown = " ".join(inl("train", "--help", "data")[1].split())
    assert "--data.phases PHASE ..." in shown
    assert "SHARE:WEIGHT,WEIGHT,..." in shown and "SHARE@SEQ_LEN" in shown


@pytest.mark.parametrize(
    "phases, named",
    [
        ("0.5;1,0", "0.5;1,0: write SHARE:WEIGHT"),
        ("0.5@x:1,0 0.5:1,1", "0.5@x:1,0: write SHARE:WEIGHT"),
        ("0.5:1, 0.5:1,1", "0.5:1,: write SHARE:WEIGHT"),
        ("50:1,0 50:1,1", "50:1,0: a share is at most 1, as in 0.5 for 50%"),
        ("-0.5:1,0", "-0.5:1,0: the share must be positive"),
        ("nan:1,0", "nan:1,0: the share must be positive"),
        ("0.5:0,0 0.5:1,1", "0.5:0,0: weights must be from 0 to 1e18, and one must be positive"),
        ("0.5:1,-1 0.5:1,1", "0.5:1,-1: weights must be from 0"),
        ("0.5:1,inf 0.5:1,1", "0.5:1,inf: weights must be from 0"),
        ("1:1e308,1e308", "1:1e+308,1e+308: weights must be from 0"),
        ("1e300:1,1 1e300:1,1", "2e+300 tokens; 1e18 is the most"),
        ("1e308:1,1 1e308:1,1", "inf tokens; 1e18 is the most"),
        ("0.5:1 0.5:1,1", "0.5:1 has 1 weights for 2 data.paths"),
        ("0.5:1,0 0.3:1,1", "0.5:1,0 0.3:1,1: the shares add up to 0.8"),
        ("0.5:1,0 2e9:1,1", "give all of them shares of the run, up to 1, or all of them tokens"),
        ("0.5@100:1,0 0.5:1,1", "0.5@100:1,0: the length must divide data.seq_len=256"),
        ("1:1,1 --data.weights 1 1", "data.phases with data.weights"),
        ("1:1,1 --num_steps 0 --num_epochs 2", "num_epochs=2.0 with data.phases"),
    ],
)
def test_phases_that_are_impossible_are_named_in_one_line(phases, named):
    with pytest.raises(InputError) as caught:
        override(TrainConfig(), ["--data.paths", "a", "b", "--data.phases", *phases.split()])
    message = str(caught.value)
    assert named in message and "\n" not in message and not message.startswith("Error"), message


@pytest.mark.parametrize(
    "make, named",
    [
        (
            lambda: DataConfig(phases=("1:1",)),
            "data.phases=('1:1',): '1:1': must be of type Phase",
        ),
        (lambda: DataConfig(phases=Phase(share=1, weights=(1,))), "must be a tuple"),
        (lambda: Phase(share="half", weights=(1,)), "share='half': must be of type float"),
        (lambda: Phase(share=1, weights=("a",)), "weights=.*: 'a': must be of type float"),
        (lambda: Phase(share=1, weights=()), "one must be positive"),
    ],
)
def test_phases_of_a_config_file_are_checked_for_their_types(make, named):
    with pytest.raises(InputError, match=named.replace("(", r"\(").replace(")", r"\)")):
        make()


def test_shares_of_thirds_add_up():
    thirds = tuple(Phase(share=share, weights=(1,)) for share in (0.333, 0.333, 0.333))
    assert DataConfig(phases=thirds).phases == thirds
