import pytest

from inl_jax.harness.stdlib_choice import CHOICES, make_questions


@pytest.mark.slow
def test_questions_have_four_different_choices_and_one_is_the_functions_own():
    made = make_questions()
    assert len(made) > 1000 and all(len(set(one["choices"])) == CHOICES for one in made)
    answers = [one["answer"] for one in made]
    assert all(0.2 < answers.count(i) / len(made) < 0.3 for i in range(CHOICES))
    own = next(one for one in made if one["question"].startswith("def shuffle(self, x):"))
    assert own["choices"][own["answer"]] == "Shuffle list x in place, and return None."
    assert make_questions.__wrapped__() == made
