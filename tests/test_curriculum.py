import dataclasses
from types import SimpleNamespace

import pytest

from inl_jax.config import DataConfig, InputError, OptimConfig, Phase, TrainConfig
from inl_jax.curriculum import (
    beginnings,
    describe,
    lengths_ahead,
    make_curriculum,
    note_read,
    read_so_far,
    resumed_position,
)
from inl_jax.data.cache import digest

BATCH, S = 8, 32


def config_of(phases, *, paths=3, num_steps=100, **fields):
    return TrainConfig(
        data=DataConfig(
            paths=tuple("abcdefg"[:paths]),
            phases=tuple(map(Phase.parse, phases.split())),
            seq_len=S,
        ),
        optim=OptimConfig(warmup_steps=0),
        num_steps=num_steps,
        batch_size=BATCH,
        **fields,
    )


def spans(curriculum):
    return [(str(span.phase), span.begin, span.end) for span in curriculum.spans[:-1]] + [
        (str(curriculum.spans[-1].phase), curriculum.spans[-1].begin)
    ]


def resumed(old, new, *, step, batch_size=BATCH):
    """The curriculum of `new`, which resumes `old` at `step`."""
    position = step * BATCH
    read = note_read(make_curriculum(old, old.num_steps), position)
    new = dataclasses.replace(new, batch_size=batch_size)
    return make_curriculum(new, new.num_steps, step=step, position=position, read=read)


GUIDE = config_of("0.5:1,0,0 0.3:0,1,0 0.2:1,1,1", num_steps=1000)


def test_phases_end_at_their_share_of_the_updates():
    assert spans(make_curriculum(GUIDE, 1000)) == [
        ("0.5:1,0,0", 0, 500 * BATCH),
        ("0.3:0,1,0", 500 * BATCH, 800 * BATCH),
        ("0.2:1,1,1", 800 * BATCH),
    ]
    ends = [span.end for span in make_curriculum(GUIDE, 7).spans[:-1]]
    assert ends == [4 * BATCH, 6 * BATCH], "at the nearest update"
    plain = make_curriculum(config_of(""), 100)
    assert len(plain.spans) == 1 and note_read(plain, 50) == [] and plain.tokens(50) == 50 * S


def test_beginnings_are_the_first_updates_of_the_phases_to_come():
    curriculum = make_curriculum(GUIDE, 1000)
    found = beginnings(curriculum, GUIDE, 0, 0)
    assert found == {
        1: "phase 1 of 3 (0.5:1,0,0) begins",
        501: "phase 2 of 3 (0.3:0,1,0) begins",
        801: "phase 3 of 3 (0.2:1,1,1) begins",
    }
    assert list(beginnings(curriculum, GUIDE, 600, 600 * BATCH)) == [801]
    assert beginnings(make_curriculum(config_of(""), 9), config_of(""), 0, 0) == {}


def test_phases_in_tokens_end_after_them_and_the_last_is_endless():
    config = config_of(f"{10 * BATCH * S}:1,0 {20 * BATCH * S}@16:0,1 {BATCH * S}:1,1", paths=2)
    curriculum = make_curriculum(config, 100)
    assert [end for _, _, end in spans(curriculum)[:-1]] == [10 * BATCH, 50 * BATCH]
    assert curriculum.tokens(50 * BATCH) == 30 * BATCH * S
    short = list(describe(make_curriculum(config, 10), config, 10))
    assert "updates 1 to 10" in short[0]
    assert all(line.endswith("no updates") for line in short[1:])
    assert "updates 51 to 9,999" in list(describe(curriculum, config, 9999))[2]


def test_lengths_ahead_are_those_of_the_updates_to_come():
    config = config_of("0.25@8:1,0,0 0.25@16:1,0,0 0.25@8:1,0,0 0.25:1,1,1")
    curriculum = make_curriculum(config, 100)
    assert lengths_ahead(curriculum, 0, 800) == [8, 16, 32]
    assert lengths_ahead(curriculum, 200, 400) == [16]
    assert lengths_ahead(curriculum, 399, 801) == [16, 8, 32]


@pytest.mark.parametrize("step", [0, 1, 499, 500, 501, 800, 999, 1000])
def test_phases_of_a_resumed_run_are_those_of_the_straight_run(step):
    assert spans(resumed(GUIDE, GUIDE, step=step)) == spans(make_curriculum(GUIDE, 1000))


@pytest.mark.parametrize(
    "phases", ["0.5:1,0,0 0.3:0,1,0 0.2:1,1,1", "640:1,0,0 320@8:0,1,0 700:0,0,1 300:1,1,1"]
)
def test_phases_that_end_between_two_updates_end_alike_from_any_start(phases):
    config = config_of(phases, num_steps=15)
    for step in range(16):
        assert spans(resumed(config, config, step=step)) == spans(make_curriculum(config, 15))


def test_phases_that_are_over_keep_their_ends_in_a_longer_run():
    longer = dataclasses.replace(GUIDE, num_steps=2000)
    ends = [end for _, _, end in spans(resumed(GUIDE, longer, step=600))[:-1]]
    assert ends == [500 * BATCH, 1600 * BATCH]
    ends = [end for _, _, end in spans(resumed(GUIDE, longer, step=1000))[:-1]]
    assert ends == [500 * BATCH, 800 * BATCH], "the last phase goes on"
    ends = [end for _, _, end in spans(resumed(GUIDE, GUIDE, step=600, batch_size=2))[:-1]]
    assert ends == [500 * BATCH, 600 * BATCH + 200 * 2], "updates count, at any batch size"


def test_phase_that_draws_otherwise_from_now_on_does_not_change_what_is_read():
    changed = config_of("0.5:1,0,0 0.3@16:0,1,1 0.2:0,0,1", num_steps=1000)
    curriculum = resumed(GUIDE, changed, step=600)
    assert spans(curriculum) == [
        ("0.5:1,0,0", 0, 500 * BATCH),
        ("0.3:0,1,0", 500 * BATCH, 600 * BATCH),
        ("0.3@16:0,1,1", 600 * BATCH, 800 * BATCH),
        ("0.2:0,0,1", 800 * BATCH),
    ]
    read = note_read(curriculum, 700 * BATCH)
    again = make_curriculum(changed, 1000, step=700, position=700 * BATCH, read=read)
    assert spans(again) == spans(curriculum), "a second resume knows both"
    before = make_curriculum(GUIDE, 1000)
    assert all(before.place(i) == curriculum.place(i) for i in range(0, 600 * BATCH, 37))


def test_phase_may_be_appended_to_a_finished_run():
    longer = config_of("0.333:1,0,0 0.2:0,1,0 0.134:1,1,1 0.333:0,0,1", num_steps=1500)
    curriculum = resumed(GUIDE, longer, step=1000)
    ends = [500 * BATCH, 800 * BATCH, 1000 * BATCH]
    assert [span.end for span in curriculum.spans[:-1]] == ends
    read = note_read(curriculum, 1200 * BATCH)
    again = make_curriculum(longer, 3000, step=1200, position=1200 * BATCH, read=read)
    assert [span.end for span in again.spans[:-1]] == ends, "and prolonged after that"


@pytest.mark.parametrize(
    "phases, step, named",
    [
        ("0.5:0,1,0 0.3:0,1,0 0.2:1,1,1", 501, "phase 1 is 0.5:0,1,0, .*and was 0.5:1,0,0"),
        ("0.5@16:1,0,0 0.3:0,1,0 0.2:1,1,1", 501, "phase 1 is 0.5@16:1,0,0, .*and was 0.5:1,0,0"),
        ("0.4:1,0,0 0.4:0,1,0 0.2:1,1,1", 501, "phase 1 is 0.4:1,0,0, .*and was 0.5:1,0,0"),
        ("0.5:1,0,0 0.3:1,1,0 0.2:1,1,1", 801, "phase 2 is 0.3:1,1,0, .*and was 0.3:0,1,0"),
        ("0.5:0,1,0 0.3:0,1,0 0.2:1,1,1", 500, "phase 1 is 0.5:0,1,0, .*and was 0.5:1,0,0"),
        ("1:1,0,0", 501, "data.phases has 1 phase, but runs/custom is in phase 2"),
    ],
)
def test_phase_that_is_over_cannot_change(phases, step, named):
    with pytest.raises(InputError, match=named):
        resumed(GUIDE, config_of(phases, num_steps=1000), step=step)


def corpus_of(*names):
    sources = [SimpleNamespace(fingerprint=name) for name in names]
    return SimpleNamespace(sources=sources, fingerprint=digest(*names))


def position_of(*names, **fields):
    return {"samples_seen": 40, "seq_len": S, "data": digest(*names)} | fields


def test_run_of_one_source_takes_up_phases_and_reads_it_on(said):
    config = config_of("0.5:1,0 0.5:1,3", paths=2, num_steps=20)
    read = read_so_far(position_of("old"), config, corpus_of("old", "new"))
    curriculum = make_curriculum(config, 20, step=5, position=40, read=read)
    assert spans(curriculum) == [("0.5:1,0", 0, 80), ("0.5:1,3", 80)]
    assert curriculum.place(40)[:2] == (0, 40)
    news = [curriculum.place(i)[1] for i in range(80, 100) if curriculum.place(i)[0] == 1]
    assert news == list(range(15)), "from its beginning"
    assert said == []


def test_read_so_far_refuses_what_it_cannot_know():
    config, corpus = config_of("0.5:1,0 0.5:1,1", paths=2), corpus_of("x", "y")
    phases = [(0, "0.5:1,0", 40)]
    plain = config_of("")
    assert read_so_far(position_of("x"), plain, corpus) == []
    for saved, asked, named in [
        (position_of("x", phases=phases), plain, "data.phases is empty, but runs/custom has"),
        (position_of("xy"), config, "trained without phases, and not on a, the first"),
        (position_of("x", seq_len=16), config, "data.seq_len=32, but runs/custom has data.seq_len"),
        (position_of("x", phases=[(0, "1:1,1,1", 40)]), config, "2 paths, but .* trained on 3"),
    ]:
        with pytest.raises(InputError, match=named):
            read_so_far(saved, asked, corpus)


def test_read_so_far_says_that_other_data_is_entered_in_its_middle(said):
    config, phases = config_of("0.5:1,0 0.5:1,1", paths=2), [[0, "0.5:1,0", 40]]
    saved = position_of("x", "y", phases=phases)
    assert read_so_far(saved, config, corpus_of("x", "y")) == phases and said == []
    read_so_far(saved, config, corpus_of("x", "z"))
    assert len(said) == 1 and "entered in its middle" in said[0]


def test_resumed_position_says_what_changed_in_the_data(said):
    """The same windows, half as long ones, and a new corpus, which is entered in its middle."""
    config, corpus = config_of("", paths=1), corpus_of("x")
    corpus.sources[0].train_tokens = 30 * S + 1
    assert resumed_position(position_of("x"), config, corpus) == 40 and said == []
    halved = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=16))
    assert resumed_position(position_of("x"), halved, corpus) == 80
    assert "data.seq_len was 32" in said[-1]
    assert resumed_position(position_of("y"), config, corpus) == 40
    assert "entered in its middle, at sample 10 of 30 in epoch 2." in said[-1]
    assert "init_from=runs/custom" in said[-1] and len(said) == 2


def test_describe_says_updates_sources_and_epochs_and_warns_of_repetition():
    lines = list(describe(make_curriculum(GUIDE, 1000), GUIDE, 1000, windows=(8000, 1250, 4000)))
    assert lines == [
        "phase 1 of 3 (0.5:1,0,0): updates 1 to 500 in sequences of 32: a 100% (0.50 epochs)",
        "phase 2 of 3 (0.3:0,1,0): updates 501 to 800 in sequences of 32: b 100% (1.92 epochs)",
        "phase 3 of 3 (0.2:1,1,1): updates 801 to 1,000 in sequences of 32: a 33.3% (0.07 epochs), "
        "b 33.3% (0.43 epochs), c 33.3% (0.13 epochs)",
        "WARNING: read more than once in this run: b 2.35 times",
    ]
    resumed = list(describe(make_curriculum(GUIDE, 1000), GUIDE, 1000, 600, 4800))
    assert resumed[0] == "phase 1 of 3 (0.5:1,0,0): over, 4,000 sequences"
    assert resumed[1].endswith("updates 601 to 800 in sequences of 32: b 100%")
    assert len(resumed) == 3, "no epochs, no warning"
