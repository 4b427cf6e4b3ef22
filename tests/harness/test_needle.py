import pytest

from inl_jax.config import InputError
from inl_jax.harness.needle import NEW_TOKENS, QUESTIONS, make_questions, questions, result


def num_bytes(text):
    return len(text.encode())


def test_questions_hold_their_answer_and_fill_the_length():
    made = make_questions(num_bytes, 256)
    assert len(made) == QUESTIONS and made == make_questions(num_bytes, 256)
    assert len({one["question"] for one in made}) == QUESTIONS
    for one in made:
        assert f" is {one['answer']}." in one["question"] and one["question"].endswith(" is")
        assert 256 - len(" The grass is green.") <= num_bytes(one["question"]) + NEW_TOKENS <= 256
    places = [one["question"].index(one["answer"]) for one in made]
    assert min(places) < 50 and max(places) > 150


def test_a_length_that_holds_no_question_is_one_line():
    with pytest.raises(InputError, match="task needle: a question has more than 64 tokens"):
        make_questions(num_bytes, 64)


def test_a_needle_is_found_where_the_answer_begins_anywhere():
    assert result({"answer": "1234"}, [" surely 1234."]) == {"found": 1.0}
    assert result({"answer": "1234"}, ["123 4"]) == {"found": 0.0}


def test_the_task_needs_a_tokenizer_and_a_length():
    for given in ({}, {"tokenizer": "."}, {"max_seq_lengths": [256]}):
        with pytest.raises(InputError, match="task needle: counts tokens"):
            questions(**given)
