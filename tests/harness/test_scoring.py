import functools

import jax
import numpy as np
import pytest
from conftest import mesh_of
from lively import lively_params
from mixer_cases import FIELDS, PATTERN

from inl_jax.config import InputError
from inl_jax.harness.scoring import Scorer, token_scores
from inl_jax.model import language_model
from inl_jax.parallel.sharding import param_shardings
from inl_jax.sampling import LanguageModel
from inl_jax.tokens.tokenizer import load_tokenizer

full_pass = jax.jit(language_model.apply, static_argnums=0)

rng = np.random.default_rng(0)


def ids(length):
    return rng.integers(0, 300, length).tolist()


def reference(model, context, continuation):
    """The score of one continuation, by a full pass over its text alone."""
    text = [*context, *continuation][-model.config.max_seq_len - 1 :]
    row = np.zeros((1, model.config.max_seq_len), np.int32)
    row[0, : len(text) - 1] = text[:-1]
    logits = full_pass(model.config, model.params, row)[0, : len(text) - 1]
    logits = np.asarray(logits, np.float64)[-len(continuation) :]
    chosen = logits[np.arange(len(continuation)), continuation]
    likelihood = np.sum(chosen - np.log(np.exp(logits).sum(axis=-1)))
    return likelihood, logits.argmax(axis=-1).tolist() == continuation


def check(model, scores, pairs):
    expected = [reference(model, *pair) for pair in pairs]
    np.testing.assert_allclose([s[0] for s in scores], [e[0] for e in expected], rtol=1e-5)
    assert [s.is_greedy for s in scores] == [e[1] for e in expected]


@pytest.fixture
def make_model(model_config):
    def make(mesh=None, **fields):
        config = model_config(num_iterations=1, **fields)
        params = lively_params(config)
        if mesh is not None:
            params = jax.device_put(params, param_shardings(mesh, config))
        return LanguageModel(config, params, load_tokenizer("bytes"), mesh)

    return make


def questions(model):
    """Questions of 3 choices, single continuations, and two of the likeliest tokens, shuffled."""
    contexts = [ids(n) for n in (1, 2, 9, 10, 10)]
    pairs = [(context, ids(n)) for context in contexts for n in (1, 3, 6)]
    pairs += [(ids(1), ids(16)), (ids(7), ids(2)), (ids(15), ids(1))]
    for context in (contexts[3], ids(5)):
        row = np.zeros((1, 32), np.int32)
        row[0, : len(context)] = context
        best = full_pass(model.config, model.params, row)[0, len(context) - 1].argmax()
        pairs.append((context, [int(best)]))
    return [pairs[i] for i in rng.permutation(len(pairs))]


@pytest.mark.parametrize(
    "mixer", [m if m == "decay" else pytest.param(m, marks=pytest.mark.slow) for m in FIELDS]
)
def test_scores_from_one_state_equal_full_passes(make_model, mixer):
    model = make_model(**FIELDS[mixer])
    pairs = questions(model)
    scores = Scorer(model, batch_size=4).score(pairs)
    check(model, scores, pairs)
    assert sum(score.is_greedy for score in scores) == 2


def test_a_context_is_read_once_for_all_its_choices(make_model):
    scorer = Scorer(make_model(), batch_size=4)
    context = ids(10)
    scorer.score([(context, ids(n)) for n in (2, 3, 4, 5)])
    assert scorer.tokens_read == 9 + (2 + 3 + 4 + 5)


@pytest.mark.slow
def test_contexts_that_are_too_long_are_cut_on_the_left_and_counted(make_model, said):
    model = make_model()
    long = ids(50)
    pairs = [(long, ids(5)), (long, ids(9)), (ids(28), ids(5)), (ids(29), ids(5))]
    check(model, Scorer(model, batch_size=2).score(pairs), pairs)
    assert said == ["3 of 4 contexts cut on the left to fit model.max_seq_len=32"]


@pytest.mark.parametrize("length", [0, 33])
def test_a_continuation_that_the_model_cannot_take_is_one_line(make_model, length):
    with pytest.raises(InputError, match=f"continuation of {length} tokens: the model takes 1 to"):
        Scorer(make_model(), batch_size=2).score([(ids(3), ids(length))])


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["decay", "gated", "attention", PATTERN])
def test_scores_do_not_depend_on_the_mesh(make_model, mixer):
    model = make_model(mesh_of(data=2, fsdp=2), **FIELDS[mixer])
    pairs = questions(model)
    check(model, Scorer(model, batch_size=8).score(pairs), pairs)


def test_the_logits_of_a_whole_batch_never_exist(make_model):
    model = make_model()
    hidden = jax.ShapeDtypeStruct((4, 16, 16), np.float32)
    targets = jax.ShapeDtypeStruct((4, 16), np.int32)
    program = jax.jit(functools.partial(token_scores, chunk=8))
    text = program.lower(model.params, hidden, targets).as_text()
    assert "4x2x300xf32" in text and "4x16x300xf32" not in text
