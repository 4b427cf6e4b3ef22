import json

import pytest
import vocabularies
from tokenizers import processors

from inl_jax.interop.exported_tokenizer import save_tokenizer
from inl_jax.tokens.tokenizer import Tokenizer, load, load_tokenizer, train_bpe

HARD = [
    "",
    " two  spaces\n\n\tand\r\nlines ",
    "".join(map(chr, range(128))),
    "é e\u0301 猫 🙂 \u200b\ufeff\u00a0 ﬁ",
    "<|endoftext|> a<|endoftext|>b <s> [SEP] <unk> <0x41>",
    *vocabularies.PARAGRAPH.splitlines(keepends=True),
]


def with_start_token():
    """A published tokenizer that puts <s> before each text."""
    backend = vocabularies.llama3()
    backend.add_special_tokens(["<s>"])
    start = ("<s>", backend.token_to_id("<s>"))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[start])
    return Tokenizer("/home/someone/tokenizer.json", backend)


def test_exported_tokenizer_is_ours_again_without_the_start_token_of_a_published_one(tmp_path):
    tokenizer = with_start_token()
    assert save_tokenizer(tokenizer, tmp_path, max_length=32) == "</s>"
    assert load(tmp_path).fingerprint == tokenizer.fingerprint
    assert json.loads((tmp_path / "tokenizer.json").read_text())["post_processor"] is None
    assert "someone" not in (tmp_path / "tokenizer_config.json").read_text()


def test_text_that_transformers_reads_otherwise_is_named(tmp_path, said):
    save_tokenizer(Tokenizer("unigram", vocabularies.unigram()), tmp_path, max_length=32)
    assert said == ["transformers reads '</s>' in a text as the end token; inl_jax leaves it out"]
    save_tokenizer(load_tokenizer("bytes"), tmp_path, max_length=32)
    assert len(said) == 1


TOKENIZERS = {
    "bytes": lambda: load_tokenizer("bytes"),
    "gpt2": lambda: load_tokenizer("gpt2"),
    "bpe": lambda: train_bpe(HARD * 3, 300),
    "with a start token": with_start_token,
    **{make.__name__: lambda make=make: Tokenizer("", make()) for make in vocabularies.ALL},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
def test_transformers_gives_the_same_ids_and_texts(name, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="the transformers extra")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = TOKENIZERS[name]()
    save_tokenizer(tokenizer, tmp_path, max_length=32)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    end = tokenizer.end_id
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id) == (end, end, end)
    assert len(theirs) == len(load(tmp_path)._backend.get_vocab()), "no token may be added"
    assert (theirs.model_max_length, theirs.padding_side) == (32, "left")
    for text in HARD:
        ids = tokenizer.encode(text).tolist()
        assert dict(theirs(text)) == {"input_ids": ids, "attention_mask": [1] * len(ids)}, text
        assert theirs.decode([*ids, end], skip_special_tokens=True) == tokenizer.decode(ids), text
