import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inl_jax.config import InputError
from inl_jax.sampling.choice import Sampling, choose, penalize

PROBABILITIES = np.array([0.1, 0.4, 0.04, 0.2, 0.06, 0.2])


@pytest.mark.parametrize(
    "settings, kept",
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"top_k": 4}, [0, 1, 3, 5]),
        ({"top_k": 2}, [1, 3, 5]),  # a tie with the second
        ({"top_k": 100}, [0, 1, 2, 3, 4, 5]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.75}, [1, 3, 5]),
        ({"top_p": 0.85}, [0, 1, 3, 5]),
        ({"top_k": 4, "top_p": 0.95}, [0, 1, 3, 5]),  # p counts among the four: 0.9 / 0.9
        ({"top_k": 4, "top_p": 0.88}, [1, 3, 5]),  # 0.8 / 0.9 already reaches it
        ({"temperature": 2.0}, [0, 1, 2, 3, 4, 5]),
        ({"min_p": 0.2}, [0, 1, 3, 5]),  # at least 0.2 * 0.4
        ({"min_p": 1.0}, [1]),
        ({"min_p": 0.2, "top_p": 0.75}, [1, 3, 5]),
        ({"min_p": 0.2, "temperature": 2.0}, [0, 1, 2, 3, 4, 5]),  # 0.2 * sqrt(0.4), after it
    ],
)
def test_draws_follow_the_renormalised_probabilities(settings, kept):
    n = 20_000
    settings = {"temperature": 1.0, "top_k": 0, "top_p": None} | settings
    logits = jnp.broadcast_to(jnp.log(PROBABILITIES) + 3.0, (n, 6))
    draws = choose(logits, jax.random.split(jax.random.key(0), n), **settings)
    expected = np.zeros(6)
    expected[kept] = PROBABILITIES[kept] ** (1 / settings["temperature"])
    expected *= n / expected.sum()
    counts = np.bincount(draws, minlength=6)
    assert np.flatnonzero(counts).tolist() == kept
    chi_square = np.sum((counts - expected)[kept] ** 2 / expected[kept])
    assert chi_square < 25  # five degrees of freedom: p = 1e-4


def test_penalize_moves_seen_tokens_away_from_being_drawn_whatever_their_sign():
    logits = jnp.array([[2.0, -2.0, 0.0, 2.0, -2.0]])
    seen = jnp.array([[True, True, True, False, False]])
    np.testing.assert_allclose(penalize(logits, seen, 1.25), [[1.6, -2.5, 0, 2, -2]], rtol=1e-6)


@pytest.mark.slow
def test_choose_keeps_the_tokens_that_transformers_keeps():
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers").generation.logits_process
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=3, size=(1, 40)).astype(np.float32)
    ids = rng.integers(0, 40, (1, 8))
    seen = np.zeros((1, 40), bool)
    seen[0, ids[0]] = True
    scores = torch.tensor(logits)
    for process in (
        processors.RepetitionPenaltyLogitsProcessor(1.3),
        processors.TemperatureLogitsWarper(1.7),
        processors.TopKLogitsWarper(20),
        processors.TopPLogitsWarper(0.9),
        processors.MinPLogitsWarper(0.05),
    ):
        scores = process(torch.tensor(ids), scores)
    expected = torch.softmax(scores, -1)[0].numpy()
    n = 20_000
    lowered = jnp.broadcast_to(penalize(logits, seen, 1.3), (n, 40))
    keys = jax.random.split(jax.random.key(0), n)
    draws = choose(lowered, keys, temperature=1.7, top_k=20, top_p=0.9, min_p=0.05)
    counts = np.bincount(draws, minlength=40)
    kept = expected > 0
    assert 3 < kept.sum() < 20 and (counts > 0).tolist() == kept.tolist()
    chi_square = np.sum((counts - n * expected)[kept] ** 2 / (n * expected[kept]))
    assert chi_square < kept.sum() + 6 * kept.sum() ** 0.5


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", 1e-30),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
    ],
)
def test_sampling_names_a_setting_that_is_out_of_range(field, value):
    with pytest.raises(InputError, match=f"{field}={value}: must be"):
        Sampling(**{field: value})
