import jax
import numpy as np
import pytest
from conftest import mesh_of
from lively import save_run

from inl_jax.sampling import LanguageModel, generate
from inl_jax.tokens.tokenizer import load_tokenizer

SAMPLING = {"max_new_tokens": 8, "temperature": 1.5, "top_k": 50, "top_p": 0.95}


def test_language_model_is_read_from_its_run(train_config):
    config = train_config()
    params, tokenizer = save_run(config), load_tokenizer("bytes")
    read = LanguageModel.from_run(config.run_dir)
    assert read.config == config.model
    jax.tree.map(np.testing.assert_array_equal, read.params, params)
    texts = read.generate(["one", "", "two"], **SAMPLING)
    prompts = [list(b"one"), [tokenizer.end_id], list(b"two")]
    rows = generate(config.model, params, prompts, end_id=tokenizer.end_id, num_ids=257, **SAMPLING)
    assert all((row < 257).all() for row in rows)  # of a model with 300 ids
    assert texts == [tokenizer.decode(row) for row in rows]
    assert read.generate("one", **SAMPLING) == texts[0]


@pytest.mark.parametrize("context", ["decay", pytest.param("attention", marks=pytest.mark.slow)])
def test_language_model_generates_the_same_on_a_mesh(train_config, context):
    """A run that is trained under fsdp and tensor can be sampled there, whatever the prompts."""
    config = train_config(model={"context": context, "num_kv_heads": 2})
    save_run(config)
    prompts = ["one", "", "two"]  # three rows, which four batch shards would not divide
    alone = LanguageModel.from_run(config.run_dir).generate(prompts, max_new_tokens=8)
    mesh = mesh_of(2, 2, 2)
    model = LanguageModel.from_run(config.run_dir, mesh=mesh)
    kernel = model.params["blocks"]["up_kernel"]
    assert kernel.addressable_shards[0].data.nbytes * 4 == kernel.nbytes
    assert model.generate(prompts, max_new_tokens=8) == alone
