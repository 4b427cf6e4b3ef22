import json

import pytest
import yaml

from inl_jax.interop.model_card import model_card

START = {
    "devices": {"kind": "NVIDIA A100", "count": 8},
    "os": "Linux",
    "versions": {"python": "3.11.7", "jax": "0.10.2", "wandb": "0.19"},
    "command": "inl train --config a --api_key abc",
    "host": "someones-laptop",
    "directory": "/home/someone",
    "git": {"commit": "0123456789abcdef", "dirty": False},
}
EVALUATION = {
    "step": 8,
    "num_steps": 9,
    "tokens": 1024,
    "epoch": 0.5,
    "validation_loss": 2.5,
    "validation_perplexity": 12.18,
    "validation_bits_per_byte": 1.25,
    "validation_tokens": 500,
}


@pytest.fixture
def card(tmp_path, train_config):
    """Makes the card of update 8 of a run of these records and starts."""

    def make(*, records=(EVALUATION,), starts=(START,), step=8, **fields):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / "metrics.jsonl").write_text(lines)
        (tmp_path / "env.json").write_text(json.dumps({"starts": list(starts)}))
        config = train_config(**fields)
        return model_card(tmp_path, config, step=step, dtype="float32", end="<|endoftext|>")

    return make


def front(text):
    """The YAML at the head of a card."""
    return yaml.safe_load(text.split("---\n")[1])


def test_card_says_what_the_run_knows(card):
    text = card()
    for fact in (
        "12,128 (12.13k), float32",
        "2 layers of width 16, decay context, 3 iterations",
        "300 ids, tokenizer `bytes`",
        "update 8 of 9, 1,024 tokens, 0.50 epochs",
        "loss 2.5000 nats per token, perplexity 12.18, bits per byte 1.25, on 500 tokens held out",
        "8 x NVIDIA A100, Linux, python 3.11.7, jax 0.10.2 at commit 0123456789ab",
        "`<|endoftext|>` ends a document",
    ):
        assert fact in text


def test_card_says_which_layers_read_by_attention(card):
    text = card(model={"context": "gated", "attention_every": 2})
    wanted = "gated context, attention in every 2nd layer, 2 heads, 1 of keys, 3 iterations"
    assert wanted in text
    assert {"gated", "attention"} < set(front(text)["tags"])


def test_card_is_of_the_update_that_is_exported(card):
    text = card(records=[EVALUATION, EVALUATION | {"step": 9, "validation_loss": 1.5}])
    assert "2.5000" in text and "1.5000" not in text
    assert "this update was not evaluated" in card(step=9)


def test_front_of_a_card_names_the_datasets_of_the_hub_and_no_licence(card):
    paths = ("hf:owner/name@part#abc", "hf:/local/set", "text.txt", "hf:owner/name")
    found = front(card(data={"paths": paths}))
    assert found["datasets"] == ["owner/name"]
    assert found["library_name"] == "transformers"
    assert found["pipeline_tag"] == "text-generation"
    assert "decay" in found["tags"] and "license" not in found
    assert "datasets" not in front(card())


def test_card_names_no_machine_no_user_and_no_secret(card):
    paths = ("/home/someone/book.txt", "data?token=abcdefgh/a.txt")
    text = card(data={"paths": paths}, init_from="/home/someone/runs/base")
    assert "`book.txt`" in text and "the weights of `base`" in text
    for secret in ("laptop", "/home", "api_key", "abcdefgh"):
        assert secret not in text


@pytest.mark.parametrize("path", ["../someone/x", "~/someone/x", "hf:/home/someone/x"])
def test_card_names_of_every_local_path_the_end_alone(card, path):
    text = card(data={"paths": (path,)}, init_from="someone/base")
    assert "| Data | `x` |" in text and "`base`" in text
    assert "someone" not in text


@pytest.mark.parametrize("starts", [(), [None], ["text"], [START | {"devices": 3}]])
def test_card_of_weights_without_records_claims_no_training(card, starts):
    text = card(records=(), starts=starts)
    assert "not known: the run has no records" in text
    assert "text.txt" not in text and "datasets" not in front(text)


def test_card_keeps_its_table_whatever_a_path_holds(card):
    text = card(data={"paths": ("a|b\nc.txt",)})
    assert r"| Data | `a\|b\nc.txt` |" in text.splitlines()
    assert "| Data | `` a`b `` |" in card(data={"paths": ("a`b",)}).splitlines()


def test_title_of_a_card_is_plain_text(tmp_path, train_config):
    folder = tmp_path / "a\n<b> `c` [d](e)"
    folder.mkdir()
    text = model_card(folder, train_config(), step=8, dtype="float32", end="<end>")
    assert r"# a\\n\<b> \`c\` \[d\](e)" in text.splitlines()
