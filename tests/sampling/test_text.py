import jax
import numpy as np
import pytest
from conftest import MODEL, mesh_of
from lively import lively_params, save_run
from mixer_cases import FIELDS, PATTERN

from inl_jax.config import ModelConfig, with_fields
from inl_jax.model.language_model import apply
from inl_jax.sampling import LanguageModel, generate
from inl_jax.tokens.tokenizer import load_tokenizer

SAMPLING = {"max_new_tokens": 8, "temperature": 1.5, "top_k": 50, "top_p": 0.95}


def test_language_model_is_read_from_its_run(train_config):
    there = train_config(model={"num_iterations": 1, "integrator_kernel": "mosaic"})  # on a Hopper
    config = with_fields(there, {"model.integrator_kernel": "xla"})
    params, tokenizer = save_run(there), load_tokenizer("bytes")
    read = LanguageModel.from_run(config.run_dir)
    assert read.config == config.model
    jax.tree.map(np.testing.assert_array_equal, read.params, params)
    texts = read.generate(["one", "", "two"], **SAMPLING)
    prompts = [list(b"one"), [tokenizer.end_id], list(b"two")]
    rows = generate(config.model, params, prompts, end_id=tokenizer.end_id, num_ids=257, **SAMPLING)
    assert all((row < 257).all() for row in rows)  # of a model with 300 ids
    assert texts == [tokenizer.decode(row).rstrip("\ufffd") for row in rows]
    assert read.generate("one", **SAMPLING) == texts[0]


@pytest.mark.parametrize(
    "mixer",
    ["decay", *(pytest.param(m, marks=pytest.mark.slow) for m in ("gated", "attention", PATTERN))],
)
def test_language_model_generates_the_same_on_a_mesh(train_config, mixer):
    """A run that is trained under fsdp and tensor can be sampled there, whatever the prompts."""
    config = train_config(model=FIELDS[mixer] | {"num_iterations": 1, "num_kv_heads": 2})
    save_run(config)
    prompts = ["one", "", "two"]  # three rows, which four batch shards would not divide
    alone = LanguageModel.from_run(config.run_dir).generate(prompts, max_new_tokens=8)
    mesh = mesh_of(2, 2, 2)
    model = LanguageModel.from_run(config.run_dir, mesh=mesh)
    blocks = model.params["blocks"]
    kernel = blocks.get("layer_0", blocks)["up_kernel"]
    assert kernel.addressable_shards[0].data.nbytes * 4 == kernel.nbytes
    assert model.generate(prompts, max_new_tokens=8) == alone


@pytest.fixture(scope="module")
def language_model():
    config = ModelConfig(**MODEL | {"num_iterations": 1})
    return LanguageModel(config, lively_params(config), load_tokenizer("bytes"))


def test_language_model_gives_the_same_text_streamed_alone_and_among_others(language_model):
    settings = SAMPLING | {"max_new_tokens": 20, "seed": 3}
    whole = language_model.generate("one", **settings)
    assert len(whole) > 8  # more than a piece
    assert "".join(language_model.stream("one", **settings)) == whole
    assert language_model.generate(["one", "two"], **settings)[0] == whole
    assert language_model.generate("one", num_samples=2, **settings)[0] == whole


def test_language_model_ends_a_text_before_its_stop_string(language_model):
    settings = SAMPLING | {"max_new_tokens": 20, "seed": 3}
    whole = language_model.generate("one", **settings)
    stop = whole[9:11]
    expected = whole[: whole.index(stop)]
    assert "".join(language_model.stream("one", stop=[stop], **settings)) == expected
    (found,) = language_model.continuations("one", stop=stop, **settings)
    assert (found.text, found.finish_reason) == (expected, "stop")
    assert found.num_tokens < 20 and found.mean_log_probability < 0


def test_mean_log_probability_is_that_of_the_full_forward_pass(language_model):
    config, params = language_model.config, language_model.params
    (found,) = language_model.continuations("one", ignore_end=True, **SAMPLING)
    prompt = list(b"one")
    (new,) = generate(config, params, [prompt], num_ids=257, **SAMPLING)
    ids = np.array([[*prompt, *new]])
    logits = jax.jit(apply, static_argnums=0)(config, params, ids)[0, 2:10, :257]
    each = jax.nn.log_softmax(logits)[np.arange(8), new]
    np.testing.assert_allclose(found.mean_log_probability, each.mean(), rtol=1e-5)
