import dataclasses
import math
import types

import jax
import numpy as np
import pytest
from conftest import mesh_of

from inl_jax.config import InputError
from inl_jax.data import batches as data
from inl_jax.data.corpus import prepare
from inl_jax.evaluation import eval_step, evaluate
from inl_jax.model import language_model as model
from inl_jax.parallel.sharding import param_shardings


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """The same documents as bytes and as BPE, a third of them for validation."""
    folder = tmp_path_factory.mktemp("evaluate")
    rng = np.random.default_rng(0)
    (folder / "docs").mkdir()
    for i in range(24):
        words = rng.choice("integrator neuron layer mean decay attention é".split(), 30)
        (folder / f"docs/{i}.txt").write_text(f"{i} " + " ".join(words))

    def make(config, tokenizer):
        fields = {"paths": (str(folder / "docs"),), "validation_fraction": 0.3}
        fields |= {"tokenizer": tokenizer, "cache_dir": str(folder / "cache"), "seq_len": 32}
        return prepare(dataclasses.replace(config.data, **fields))

    return make


@pytest.fixture
def setting(train_config, corpora):
    config = train_config(model={"num_layers": 1})
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: rng.normal(0, 0.3, a.shape).astype(a.dtype), model.abstract_params(config.model)
    )
    return config, params, corpora(config, "bytes")


def run(setting, *, batch_size=4, max_sequences=0, **settings):
    config, params, corpus = setting
    batches = data.eval_batches(
        corpus, seq_len=32, batch_size=batch_size, max_sequences=max_sequences
    )
    return evaluate(config.model, params, batches, **settings)


def test_evaluate_gives_the_same_number_every_time_and_for_every_batch_size(setting):
    first = run(setting)
    assert run(setting).loss == first.loss
    for batch_size in (1, 7):
        other = run(setting, batch_size=batch_size)
        assert other.loss == pytest.approx(first.loss, rel=1e-6)
        assert other.tokens == first.tokens


@pytest.mark.parametrize("max_sequences", [0, 5])
def test_evaluate_takes_the_mean_over_all_targets(setting, max_sequences):
    config, params, corpus = setting
    result = run(setting, max_sequences=max_sequences)
    (files,) = corpus.sources
    tokens = np.array(files.open("validation")[:], np.int32)
    count = -(-len(tokens) // 32)
    chosen = np.arange(5) * count // 5 if max_sequences else np.arange(count)
    inputs = np.zeros((count, 32), np.int32)
    inputs.flat[: len(tokens)] = np.concatenate([[corpus.tokenizer.end_id], tokens[:-1]])
    logits = jax.jit(model.apply, static_argnums=0)(config.model, params, inputs)
    logits = np.asarray(logits, np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    log_probability = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    losses = np.zeros(count * 32)
    losses[: len(tokens)] = -log_probability.reshape(-1, 300)[np.arange(len(tokens)), tokens]
    wanted = losses.reshape(count, 32)[chosen]
    size = min(len(tokens), 5 * 32) if max_sequences else len(tokens)
    assert result.tokens == size
    assert result.loss == pytest.approx(wanted.sum() / size, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))


def test_evaluate_weighs_tokens_by_the_text_they_stand_for(setting, corpora):
    """The whole split costs the same bits in either unit, whatever the tokenizer."""
    config, params, _ = setting
    for tokenizer in ("bytes", "bpe:280"):
        corpus = corpora(config, tokenizer)
        (files,) = corpus.sources
        text = files.open("validation")[:]
        decoded = corpus.tokenizer.decode(text[text != corpus.tokenizer.end_id])
        assert files.validation_bytes == len(decoded.encode())
        result = run((config, params, corpus))
        bits = result.loss * result.tokens / math.log(2)
        assert result.bits_per_byte == pytest.approx(bits / len(decoded.encode()))


def test_evaluate_names_an_empty_split(setting):
    config, params, _ = setting
    with pytest.raises(InputError, match="data.validation_fraction"):
        evaluate(config.model, params, [])


@pytest.mark.parametrize("tol", [0.0, 0.02])
def test_evaluate_gives_the_same_number_on_a_mesh(setting, tol):
    config, params, corpus = setting
    with_tol = types.SimpleNamespace(model=dataclasses.replace(config.model, tol=tol))
    mesh = mesh_of(2, 2, 2)
    sharded = jax.device_put(params, param_shardings(mesh, config.model))
    found = run((with_tol, sharded, corpus), mesh=mesh)
    alone = run((with_tol, params, corpus))
    assert found.loss == pytest.approx(alone.loss, rel=1e-6)
    assert found.steps_per_token == pytest.approx(alone.steps_per_token, rel=1e-3)
    if tol == 0:
        assert alone.steps_per_token == config.model.num_iterations
    else:
        assert 1 < alone.steps_per_token < config.model.num_iterations


def test_evaluate_holds_the_logits_of_loss_chunk_tokens_at_once(setting):
    """The chunk of the config holds here too: it decides memory, and not the number."""
    config, params, corpus = setting
    (batch, *_) = data.eval_batches(corpus, seq_len=32, batch_size=8)

    def temporaries(loss_chunk):
        lowered = eval_step.lower(config.model, params, *batch[:3], loss_chunk=loss_chunk)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    logits = 8 * 32 * config.model.vocab_size * 4
    assert temporaries(0) > logits > temporaries(16)
    assert run(setting, loss_chunk=16).loss == pytest.approx(run(setting).loss, rel=1e-6)
