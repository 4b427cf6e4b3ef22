import contextlib

import jax
import numpy as np
import pytest
from conftest import MODEL
from lively import lively_params
from mixer_cases import FIELDS, PATTERN

from inl_jax.config import InputError, ModelConfig
from inl_jax.sampling import LanguageModel, decoding, generate
from inl_jax.sampling.conversation import Conversation
from inl_jax.tokens.tokenizer import load_tokenizer

GREEDY = {"max_new_tokens": 4, "ignore_end": True}


def talk(conversation, text, **settings):
    conversation.say(text)
    for answer in conversation.answer(**GREEDY | settings):
        answer.take()
    return answer.taken


@pytest.fixture(
    scope="module", params=["decay", "attention", pytest.param(PATTERN, marks=pytest.mark.slow)]
)
def model(request):
    config = ModelConfig(**MODEL | FIELDS[request.param] | {"num_iterations": 1})
    return LanguageModel(config, lively_params(config), load_tokenizer("bytes"))


def test_conversation_continues_the_whole_history_and_reads_only_what_is_new(model, monkeypatch):
    conversation = Conversation(model)
    first = talk(conversation, "one")
    assert first == model.generate("one", **GREEDY) and conversation.text == f"one{first}"
    read = []

    def read_more(*arguments):
        read.append(arguments[-1])
        return decoding.read_more(*arguments)

    monkeypatch.setattr("inl_jax.sampling.conversation.read_more", read_more)
    second = talk(conversation, "two")
    kept = conversation.text.removesuffix(second)
    assert kept == f"one{first}two" and second == model.generate(kept, **GREEDY)
    assert read == [list(f"{first}two".encode())], "what was answered and said since"

    assert conversation.undo() and conversation.text == f"one{first}"
    third = talk(conversation, "two")
    assert third == second and conversation.undo() and conversation.undo()
    assert not conversation.undo() and conversation.text == ""
    assert talk(conversation, "one") == first
    conversation.reset()
    assert conversation.text == "" and talk(conversation, "one") == first


def test_conversation_keeps_what_was_taken_of_an_answer_that_was_cut(model):
    conversation = Conversation(model)
    conversation.say("one")
    with contextlib.closing(conversation.answer(**GREEDY | {"max_new_tokens": 16})) as growing:
        for answer in growing:
            if shown := answer.take():  # the first bytes may be a part of a character
                break
    assert shown and conversation.text == f"one{shown}"
    ids = [*b"one", *answer.taken_ids()]
    assert len(ids) == conversation.num_tokens
    (new,) = generate(model.config, model.params, [ids], max_new_tokens=4, num_ids=257)
    assert talk(conversation, "") == model.tokenizer.decode(new).rstrip("\ufffd")


def test_conversation_goes_on_after_a_stop_string_as_if_it_had_read_the_history_anew(model):
    conversation = Conversation(model)
    drawn = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3}
    stop = model.generate("one", **GREEDY | drawn)[2]
    cut = talk(conversation, "one", stop=[stop], **drawn)
    assert stop not in cut and conversation.text == f"one{cut}"
    ids = [*conversation._ids, *b"x"]
    (new,) = generate(model.config, model.params, [ids], max_new_tokens=4, num_ids=257)
    assert talk(conversation, "x") == model.tokenizer.decode(new).rstrip("\ufffd")


def test_conversation_of_attention_ends_where_its_context_does(model):
    conversation = Conversation(model)
    talk(conversation, "a" * 30)
    if model.config.uses_attention:
        assert conversation.num_tokens <= 32, "the answer had room for 2 tokens"
        with pytest.raises(InputError, match="leaves no room for an answer"):
            talk(conversation, "bcd")
        conversation.undo()
        assert conversation.text.startswith("a" * 30) and "bcd" not in conversation.text
    else:
        sizes = [leaf.size for leaf in jax.tree.leaves(conversation._read)]
        talk(conversation, "b" * 30)
        assert conversation.num_tokens > 60
        assert [np.size(leaf) for leaf in jax.tree.leaves(conversation._read)] == sizes
