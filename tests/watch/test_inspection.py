import jax
import numpy as np
import pytest
import vocabularies

from inl_jax.config import InputError
from inl_jax.model.language_model import abstract_params
from inl_jax.sampling import LanguageModel
from inl_jax.tokens.tokenizer import Tokenizer, load_tokenizer, train_bpe
from inl_jax.watch.inspection import inspect_prompts, token_texts
from inl_jax.watch.integrator_probe import watch_tokens

TEXT = "the café, 世界 \ufffd and the café\n"


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_token_texts_add_up_to_the_text(name):
    tokenizer = load_tokenizer("bytes") if name == "bytes" else train_bpe([TEXT] * 9, 275)
    ids = tokenizer.encode(TEXT)
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts) == TEXT


def test_character_of_several_tokens_belongs_to_the_last_one():
    tokenizer = load_tokenizer("bytes")
    assert token_texts(tokenizer, tokenizer.encode("aé界")) == ["a", "", "é", "", "", "界"]
    assert token_texts(tokenizer, tokenizer.encode("é")[:1]) == ["\ufffd"]  # cut short


@pytest.mark.parametrize("make", vocabularies.ALL)
def test_token_texts_add_up_for_any_decoder(make):
    tokenizer = Tokenizer(make.__name__, make())
    ids = tokenizer.encode(vocabularies.PARAGRAPH)
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts) == tokenizer.decode(ids)


@pytest.fixture
def model(model_config):
    config = model_config()
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: rng.normal(0, 0.3, a.shape).astype(a.dtype), abstract_params(config)
    )
    return LanguageModel(config, params, load_tokenizer("bytes"))


def test_inspected_prompt_does_not_depend_on_longer_neighbours(model):
    found = inspect_prompts(model, ["abc", "", "a longer one"])
    assert [one.texts for one in found[:2]] == [["a", "b", "c"], [""]]
    for name, values in watch_tokens(model.config, model.params, [[97, 98, 99]]).items():
        np.testing.assert_allclose(
            found[0].watched_LTS[name], values[:, :, 0], rtol=1e-4, atol=1e-6
        )


def test_prompt_that_the_model_cannot_hold_is_named(model):
    with pytest.raises(InputError, match=r"'xxx.*has 33 tokens, and model.max_seq_len=32"):
        inspect_prompts(model, ["x" * 33])
