"""The task `needle`: a number that stands in a long text is asked for at its end.

In the manner of `niah_single_1` of RULER (Hsieh et al., 2024), whose texts have at least some 500
characters. This one fits models of a few hundred tokens, and needs no package of its own.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

from inl_jax.config import InputError
from inl_jax.files import user_path
from inl_jax.storage.run_dir import read_config, read_tokenizer
from inl_jax.tokens.tokenizer import load

QUESTIONS = 200  # of each length
NEW_TOKENS = 16  # room for the answer, as needle.yaml has it
_GRASS = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.")
_NEEDLE = "The magic number of {key} is {value}."
_KEYS = ("Oslo", "Lima", "Rome", "Cairo", "Paris", "Tokyo", "Delhi", "Quito", "Accra", "Seoul")


def questions(
    checkpoint: str = "",
    tokenizer: str = "",
    pretrained: str = "",
    max_seq_lengths: Sequence[int] = (),
    **others: Any,
) -> dict[str, Any]:
    """The task's data, for lm_eval, which passes on `--model_args` and `--metadata`.

    Args:
      checkpoint: a run, which has a tokenizer and a length.
      tokenizer: a directory with a tokenizer.json, to count tokens with.
      pretrained: the same.
      max_seq_lengths: tokens of the texts, answer included; the run's `max_seq_len` by default.
      others: whatever else is passed.

    Raises:
      InputError: there is no tokenizer or no length, or a length is too short for a question.
    """
    if checkpoint:
        encode = read_tokenizer(checkpoint).encode
        lengths = max_seq_lengths or [read_config(checkpoint).model.max_seq_len]
    else:
        lengths, folder = max_seq_lengths, tokenizer or pretrained
        if not folder or not lengths:
            raise InputError(
                "task needle: counts tokens; name the tokenizer's directory and the lengths by "
                '--metadata \'{"tokenizer": "DIR", "max_seq_lengths": [1024]}\''
            )
        encode = load(user_path(folder, "tokenizer")).encode
    made = [
        question
        for length in lengths
        for question in make_questions(lambda text: len(encode(text)), length)
    ]
    import datasets

    return {"test": datasets.Dataset.from_list(made)}


def make_questions(count: Callable[[str], int], length: int) -> list[dict[str, str]]:
    """`question` and `answer` of `QUESTIONS` texts, as long as `length` tokens allow.

    Raises:
      InputError: no question is so short.
    """
    return [
        _make_question(random.Random(f"{length} {index}"), count, length)
        for index in range(QUESTIONS)
    ]


def _make_question(draw: random.Random, count: Callable[[str], int], length: int) -> dict[str, str]:
    key, value, depth = draw.choice(_KEYS), str(draw.randrange(1000, 10000)), draw.random()
    needle = _NEEDLE.format(key=key, value=value)
    asked = needle.partition(f" {value}")[0]

    def text(lines: int) -> str:
        grass = [_GRASS[i % len(_GRASS)] for i in range(lines)]
        place = round(depth * lines)
        return " ".join([*grass[:place], needle, *grass[place:], asked])

    lines = _most(lambda lines: count(text(lines)) + NEW_TOKENS <= length)
    if lines == 0:
        raise InputError(
            f"task needle: a question has more than {length} tokens; evaluate a model with a "
            "larger model.max_seq_len"
        )
    return {"question": text(lines), "answer": value}


def _most(fits: Callable[[int], bool]) -> int:
    """The largest n for which `fits(n)`, which holds up to it; 0 if it does not hold for 1."""
    high = 1
    while fits(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def result(question: dict[str, str], answers: Sequence[str]) -> dict[str, float]:
    """1 if the number stands in what was generated."""
    return {"found": float(question["answer"] in answers[0])}
