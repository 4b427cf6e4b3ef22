import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest

from inl_jax.config import DataConfig, Phase
from inl_jax.data.batches import training_batches, training_samples
from inl_jax.data.corpus import prepare
from inl_jax.data.phases import Curriculum, Mixture, PhasedSamples, Span

S = 32
ENDLESS = 2**62


def make_curriculum(*phases, num_sources=3):
    """`("1@8:1,0,0", samples)` for each phase; the last is endless."""
    ends = itertools.accumulate(samples for _, samples in phases)
    spans, begin = [], 0
    for number, ((text, _), end) in enumerate(zip(phases, ends, strict=True)):
        spans.append(Span(number, Phase.parse(text), begin, end))
        begin = end
    spans[-1] = spans[-1]._replace(end=ENDLESS)
    return Curriculum(spans, seq_len=S, num_sources=num_sources)


# As in the guide, then with the last two sources and other lengths.
MIXED = make_curriculum(
    ("0.5:1,0,0", 777),
    ("0.3@8:.3,.7,0", 1001),
    ("0.1:.2,.2,.6", 503),
    ("0.05@16:0,1,1", 333),
    ("0.05@8:1,1,1", 1),
)


@pytest.mark.parametrize(
    "weights", [(1, 0, 0), (1, 1, 1), (0.5, 0.3, 0.2), (97, 2, 1), (1,) * 70, (0, 1e-4, 1)]
)
def test_mixture_keeps_to_its_weights_at_every_sample(weights):
    mixture, num_samples = Mixture(weights), 3000
    draws = [mixture.draw(i) for i in range(num_samples)]
    given = np.zeros((num_samples + 1, len(weights)))
    for i, (source, nth) in enumerate(draws):
        assert nth == given[i, source], "0, 1, 2, ... of each source"
        given[i + 1] = given[i]
        given[i + 1, source] += 1
    exact = np.outer(np.arange(num_samples + 1), np.array(weights) / sum(weights))
    assert np.abs(given - exact).max() < 1
    for n in (0, 1, 99, 3000):
        np.testing.assert_array_equal(mixture.drawn(n), given[n])


def test_mixture_is_exact_to_one_in_a_thousand_far_out():
    mixture = Mixture((0.613, 0.387, 1e-3))
    for n in (10**6 + 7, 10**12 + 3):
        shares = mixture.drawn(n) / n
        np.testing.assert_allclose(shares, np.array([0.613, 0.387, 1e-3]) / 1.001, atol=1e-4)
        source, nth = mixture.draw(n)
        assert nth == mixture.drawn(n)[source]


def test_mixture_is_small_enough_for_a_thousand_phases():
    assert sum(array.nbytes for array in vars(Mixture((0.3, 0.7))).values()) < 100_000


def test_curriculum_reads_every_source_on_where_it_was_and_no_token_twice():
    seen, before = Counter(), [0, 0, 0]
    for sample in range(3500):
        source, window, part = MIXED.place(sample)
        start = window * S + part.start
        assert 0 <= part.start and part.stop <= S + 1, "within its window"
        assert start >= before[source], "in order"
        assert start - before[source] < S, "nothing is left out but the rest of a window"
        before[source] = start + MIXED.seq_len_of(sample)
        assert part.stop - part.start == MIXED.seq_len_of(sample) + 1
        seen.update((source, token) for token in range(start, before[source]))
    assert set(seen.values()) == {1}
    np.testing.assert_array_equal(MIXED.tokens_read(3500), before)
    assert MIXED.tokens(3500) == len(seen)


def test_curriculum_gives_each_phase_its_sources_and_lengths():
    drawn = [MIXED.place(sample)[0] for sample in range(3000)]
    lengths = [MIXED.seq_len_of(sample) for sample in range(3000)]
    phases = [(0, 777), (777, 1778), (1778, 2281), (2281, 2614), (2614, 3000)]
    shares = [np.bincount(drawn[a:b], minlength=3) / (b - a) for a, b in phases]
    wanted = [(1, 0, 0), (0.3, 0.7, 0), (0.2, 0.2, 0.6), (0, 0.5, 0.5), (1 / 3, 1 / 3, 1 / 3)]
    np.testing.assert_allclose(shares, wanted, atol=0.003)
    assert [set(lengths[a:b]) for a, b in phases] == [{32}, {8}, {32}, {16}, {8}]


def test_curriculum_ignores_phases_without_samples():
    empty = make_curriculum(("0.1:0,1,0", 0), ("0.5:1,0,0", 5), ("0.1:0,1,0", 0), ("0.3:0,0,1", 1))
    assert [empty.place(sample)[:2] for sample in range(7)] == [
        *[(0, window) for window in range(5)],
        (2, 0),
        (2, 1),
    ]


@pytest.fixture(scope="module")
def three_sources(tmp_path_factory):
    """A corpus of three texts of 400, 300 and 200 windows whose letters tell them apart."""
    folder = tmp_path_factory.mktemp("phases")
    rng, paths = np.random.default_rng(0), []
    for name, letters, windows in (("a", b"abcd", 400), ("b", b"ABCD", 300), ("c", b"1234", 200)):
        paths.append(str(folder / f"{name}.txt"))
        (folder / f"{name}.txt").write_bytes(
            rng.choice(list(letters), windows * S).astype(np.uint8).tobytes()
        )
    config = DataConfig(
        paths=tuple(paths),
        phases=(Phase(share=1, weights=(1, 1, 1)),),
        tokenizer="bytes",
        seq_len=S,
        validation_fraction=0,
        cache_dir=str(folder / "cache"),
    )
    return config, prepare(config)


def test_phased_samples_from_any_position_are_those_of_the_straight_run(three_sources):
    config, corpus = three_sources
    straight = training_samples(corpus, config, 0, MIXED)
    expected = [straight[sample] for sample in range(3000)]
    letters = ["".join(sorted(set(map(chr, row[:-1])))) for row in expected[:777]]
    assert set(letters) <= {"abcd", "abc", "abd", "acd", "bcd"}, "the first phase reads the first"
    resumed = training_samples(corpus, config, 0, MIXED)
    for position in np.random.default_rng(1).integers(0, 3000, 50):
        np.testing.assert_array_equal(resumed[int(position)], expected[position])
    batches = training_batches(
        resumed, position=777, batch_size=7, rows=slice(2, 5), num_batches=143
    )
    for i, batch in enumerate(batches):  # a whole phase, in this process's rows
        np.testing.assert_array_equal(batch, np.stack(expected[777 + 7 * i :][2:5]))


def test_phased_samples_show_every_window_once_in_an_epoch(three_sources):
    config, corpus = three_sources
    curriculum = make_curriculum(("0.5@8:1,1,0", 1200), ("0.5:1,1,1", 1))
    samples = training_samples(corpus, config, 0, curriculum)
    n = (corpus.sources[0].train_tokens - 1) // S
    shown = [samples[i][:-1] for i in range(2200) if curriculum.place(i)[0] == 0]
    epoch = np.concatenate(shown)[: n * S].reshape(n, S)
    tokens = np.array(corpus.sources[0].open("train")[:])[: n * S].reshape(n, S)
    assert sorted(map(bytes, epoch.astype(np.uint8))) == sorted(map(bytes, tokens.astype(np.uint8)))


def test_phased_samples_of_one_source_are_those_of_a_run_without_phases(three_sources):
    config = dataclasses.replace(three_sources[0], paths=three_sources[0].paths[:1], phases=())
    corpus = prepare(config)
    plain = training_samples(corpus, config, 0)
    one = dataclasses.replace(config, phases=(Phase(share=1, weights=(1,)),))
    phased = training_samples(corpus, one, 0, make_curriculum(("1:1", 1), num_sources=1))
    assert isinstance(phased, PhasedSamples) and not isinstance(plain, PhasedSamples)
    for sample in (0, 5, 1234):
        np.testing.assert_array_equal(phased[sample], plain[sample])
