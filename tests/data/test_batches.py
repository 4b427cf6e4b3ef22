import dataclasses
import os

import numpy as np
import pytest

from inl_jax.config import DataConfig, InputError
from inl_jax.data import batches as data
from inl_jax.data.corpus import prepare

S = 16
END = 256  # of the bytes tokenizer


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Bytes of one source, and of two mixed; lower and upper case tell the sources apart."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    paths = []
    for name, size, alphabet in [("lower", 5000, b"abcdefgh"), ("upper", 1500, b"ABCDEFGH")]:
        paths.append(str(folder / f"{name}.txt"))
        letters = rng.choice(list(alphabet), size).astype(np.uint8)
        letters[99::100] = ord("\n")
        (folder / f"{name}.txt").write_bytes(letters.tobytes())

    def make(paths, weights=()):
        config = DataConfig(
            paths=tuple(paths),
            weights=weights,
            tokenizer="bytes",
            seq_len=S,
            validation_fraction=0.3,
            cache_dir=str(folder / "cache"),
        )
        return config, prepare(config)

    return {"one": make(paths[:1]), "mixed": make(paths, (3.0, 1.0))}


def read(corpora, name="one", *, seed=0, position=0, batch_size=8, rows=None, num_batches=6):
    config, corpus = corpora[name]
    samples = data.training_samples(corpus, config, seed)
    rows = rows or slice(0, batch_size)
    batches = data.training_batches(
        samples, position=position, batch_size=batch_size, rows=rows, num_batches=num_batches
    )
    return np.concatenate(list(batches))


def windows(corpora):
    config, corpus = corpora["one"]
    tokens = np.array(corpus.sources[0].open("train")[:])
    n = data.count_windows(corpus.sources[0], S)
    return np.stack([tokens[i * S : i * S + S + 1] for i in range(n)])


@pytest.mark.parametrize("name", ["one", "mixed"])
def test_batch_is_a_function_of_seed_and_index(corpora, name):
    first = read(corpora, name, seed=1)
    assert first.shape == (48, S + 1) and first.dtype == np.int32
    np.testing.assert_array_equal(first, read(corpora, name, seed=1))
    assert not np.array_equal(first, read(corpora, name, seed=2))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_global_batches_are_the_same_for_any_number_of_processes(corpora, processes):
    whole = read(corpora, "mixed").reshape(6, 8, S + 1)
    each = 8 // processes
    parts = [
        read(corpora, "mixed", rows=slice(i * each, (i + 1) * each)).reshape(6, each, S + 1)
        for i in range(processes)
    ]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


@pytest.mark.parametrize("name", ["one", "mixed"])
def test_position_resumes_exactly_at_any_batch_size(corpora, name):
    whole = read(corpora, name, num_batches=60)  # over several epochs
    for batch_size in (8, 4, 6):
        tail = read(
            corpora, name, position=200, batch_size=batch_size, num_batches=240 // batch_size
        )
        np.testing.assert_array_equal(tail, whole[200 : 200 + len(tail)])


def test_epoch_shows_every_window_once_in_an_order_of_its_own(corpora):
    expected = windows(corpora)
    n = len(expected)
    epochs = read(corpora, batch_size=n, num_batches=3).reshape(3, n, S + 1)
    for epoch in epochs:
        assert sorted(map(bytes, epoch)) == sorted(map(bytes, expected.astype(np.int32)))
        assert not np.array_equal(epoch, expected)
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])


def test_consecutive_windows_share_one_token_so_that_every_token_is_a_target(corpora):
    expected = windows(corpora)
    np.testing.assert_array_equal(expected[1:, 0], expected[:-1, -1])


def test_sources_are_mixed_by_weight(corpora):
    rows = read(corpora, "mixed", batch_size=100, num_batches=4)
    upper = np.isin(rows, list(b"ABCDEFGH")).any(axis=1)
    lower = np.isin(rows, list(b"abcdefgh")).any(axis=1)
    assert not np.any(upper & lower)
    assert abs(upper.mean() - 0.25) < 0.01
    assert abs(upper[:100].mean() - 0.25) < 0.02  # from the start, not on average


@pytest.mark.parametrize("name", ["one", "mixed"])
@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_validation_tokens_are_targets_once_each(corpora, name, batch_size):
    _, corpus = corpora[name]
    batches = list(data.eval_batches(corpus, seq_len=S, batch_size=batch_size))
    assert all(part.shape == (batch_size, S) for batch in batches for part in batch[:3])
    inputs, targets, weights, num_bytes, source = (
        np.concatenate(part) for part in zip(*batches, strict=True)
    )
    np.testing.assert_array_equal(
        [weights[source == i].sum() for i in range(len(corpus.sources))],
        [files.validation_tokens for files in corpus.sources],
    )
    tokens = [np.array(files.open("validation")[:]) for files in corpus.sources]
    np.testing.assert_array_equal(targets[weights == 1], np.concatenate(tokens))
    before = [np.concatenate([[END], part[:-1]]) for part in tokens]
    np.testing.assert_array_equal(inputs[weights == 1], np.concatenate(before))
    assert set(np.unique(weights)) <= {0.0, 1.0}
    whole = sum(files.validation_bytes for files in corpus.sources)
    np.testing.assert_allclose(num_bytes.sum(dtype=np.float64), whole, rtol=1e-6)
    assert weights.dtype == np.float32 and inputs.dtype == targets.dtype == np.int32


@pytest.mark.parametrize("name", ["one", "mixed"])
def test_part_of_the_validation_split_is_fixed_and_spread(corpora, name):
    _, corpus = corpora[name]

    def rows(max_sequences, batch_size):
        batches = data.eval_batches(
            corpus, seq_len=S, batch_size=batch_size, max_sequences=max_sequences
        )
        _, targets, weights, *_ = (np.concatenate(part) for part in zip(*batches, strict=True))
        return targets[weights.any(axis=1)]

    part, whole = rows(6, 4), rows(0, 4)
    assert len(part) == 6 < len(whole)
    np.testing.assert_array_equal(part, rows(6, 5))
    places = [np.flatnonzero((whole == row).all(axis=1))[0] for row in part]
    assert np.all(np.diff(places) > 0)
    assert places[-1] > 0.6 * len(whole)
    np.testing.assert_array_equal(rows(10**6, 4), whole)


def test_corpus_that_does_not_fit_the_model_is_named(corpora):
    config, corpus = corpora["one"]
    data.check(corpus, 257)
    with pytest.raises(InputError, match="model.vocab_size=256.* 257 ids"):
        data.check(corpus, 256)
    n = corpus.sources[0].train_tokens
    data.check_windows(corpus, dataclasses.replace(config, seq_len=n - 1))
    with pytest.raises(InputError, match=f"{n} training tokens.*data.seq_len={n}"):
        data.check_windows(corpus, dataclasses.replace(config, seq_len=n))


@pytest.fixture
def damageable(tmp_path):
    """A config, its corpus, and its files of tokens."""
    (tmp_path / "a.txt").write_bytes(bytes(range(97, 117)) * 100)
    config = DataConfig(
        paths=(str(tmp_path / "a.txt"),),
        tokenizer="bytes",
        seq_len=S,
        validation_fraction=0.5,
        cache_dir=str(tmp_path / "cache"),
    )
    corpus = prepare(config)
    directory = corpus.sources[0].directory
    return config, corpus, directory / "train.bin", directory / "validation.bin"


def read_all(config, corpus):
    samples = data.training_samples(corpus, config, seed=0)
    n = data.count_windows(corpus.sources[0], S)
    rows = {"position": 0, "batch_size": n, "rows": slice(0, n), "num_batches": 1}
    return next(data.training_batches(samples, **rows))


def eval_all(config, corpus):
    return list(data.eval_batches(corpus, seq_len=S, batch_size=4))


def test_files_removed_under_a_job_are_read_to_the_end(damageable):
    config, corpus, *files = damageable
    for file in files:
        file.unlink()
    assert len(read_all(config, corpus)) and len(eval_all(config, corpus))


def test_files_damaged_under_a_job_end_it_in_a_line(damageable):
    config, corpus, *files = damageable
    for file, read in zip(files, (read_all, eval_all), strict=True):
        with open(file, "r+b") as handle:
            handle.seek(600)
            handle.write(b"\xff\xff")
        with pytest.raises(InputError, match=rf"{file}, token 300: id 65535, and the tokenizer"):
            read(config, corpus)
        os.truncate(file, 500)
        with pytest.raises(InputError, match=rf"{file}: was cut short to 250 of") as caught:
            read(config, corpus)
        assert "\n" not in str(caught.value)
