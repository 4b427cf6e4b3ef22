import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inl_jax.sampling.choice import choose

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
