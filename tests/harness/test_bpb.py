import json
from pathlib import Path

import jax
import numpy as np
import pytest
from lively import save_run

from inl_jax.config import InputError
from inl_jax.data.batches import eval_batches
from inl_jax.evaluation import evaluate
from inl_jax.harness.bpb import documents, validation_texts
from inl_jax.model import language_model
from inl_jax.sampling import LanguageModel
from inl_jax.storage.run_dir import record_run
from inl_jax.tokens.tokenizer import load_tokenizer

forward = jax.jit(language_model.apply, static_argnums=0)


@pytest.fixture
def texts(tmp_path, make_corpus):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "é" * i + f" {i}."}) + "\n" for i in range(40)))
    return make_corpus(path)


def test_validation_texts_are_the_documents_that_were_held_out(texts):
    found = list(validation_texts(texts))
    files = texts.sources[0]
    assert 0 < len(found) < 40 and set(found) <= {"é" * i + f" {i}." for i in range(40)}
    assert sum(len(text.encode()) for text in found) == files.validation_bytes
    assert sum(len(texts.tokenizer.encode(text)) for text in found) + len(found) == (
        files.validation_tokens
    )


def test_the_task_needs_a_run():
    with pytest.raises(InputError, match="task bpb: has the text of a run; name it by --metadata"):
        documents(version=1.0)


def test_a_run_without_records_is_said_to_know_its_text(train_config, said):
    pytest.importorskip("datasets")
    config = train_config()
    record_run(config, load_tokenizer("bytes"))
    for lines, warned in (("", True), ('{"step": 1, "loss": 5.0}\n', False)):
        said.clear()
        Path(config.run_dir, "metrics.jsonl").write_text(lines)
        documents(config.run_dir)
        assert any("has no records of a training" in line for line in said) == warned


@pytest.mark.slow
def test_bits_per_byte_are_those_of_evaluate_on_each_document_without_its_end_token(
    tmp_path, train_config, make_corpus
):
    pytest.importorskip("lm_eval")
    from inl_jax.harness.tasks import evaluate_tasks, load_tasks

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "é" * i + f" {i}."}) + "\n" for i in range(14)))
    config = train_config(data={"paths": (str(path),), "validation_fraction": 0.5})
    params = save_run(config)
    model = LanguageModel.from_run(config.run_dir)
    found = evaluate_tasks(model, load_tasks(config.run_dir, ["bpb"]), batch_size=4)

    nats = end_nats = num_bytes = 0
    for text in documents(config.run_dir)["validation"]["text"]:
        alone = tmp_path / "alone.txt"
        alone.write_text(text)
        corpus = make_corpus(alone, validation_fraction=1.0)
        score = evaluate(config.model, params, eval_batches(corpus, seq_len=32, batch_size=1))
        nats += score.loss * score.tokens
        row = np.zeros((1, 32), np.int32)
        row[0, : score.tokens] = [256, *text.encode()]
        logits = np.asarray(forward(config.model, params, row))[0, score.tokens - 1]
        end_nats += np.log(np.exp(logits).sum()) - logits[256]
        num_bytes += len(text.encode())
    bits = found["results"]["bpb"]["bits_per_byte,none"]
    np.testing.assert_allclose(bits, (nats - end_nats) / num_bytes / np.log(2), rtol=1e-5)
