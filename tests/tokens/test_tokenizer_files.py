import copy
import json
import subprocess
import sys

import pytest
import tokenizers
import vocabularies
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from inl_jax.checks import InputError
from inl_jax.tokens.tokenizer import load, load_tokenizer, train_bpe
from inl_jax.tokens.tokenizer_files import one_line

ENDS = ["<|endoftext|>", "</s>", "<s>"]


def write_tokenizer(folder, *words):
    """A tokenizer.json of all bytes and these special words."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(list(words))
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    return folder


def write_files(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "files, end",
    [
        ({}, 256),
        ({"tokenizer_config": {"eos_token": "</s>"}}, 257),
        ({"tokenizer_config": {"eos_token": {"content": "</s>", "special": True}}}, 257),
        (
            {"tokenizer_config": {"eos_token": None}, "special_tokens_map": {"eos_token": "<s>"}},
            258,
        ),
        ({"special_tokens_map": {"eos_token": {"content": "</s>"}}}, 257),
        ({"generation_config": {"eos_token_id": [258, 257]}, "config": {"eos_token_id": 257}}, 258),
        ({"config": {"eos_token_id": 257}}, 257),
        ({"tokenizer_config": {"eos_token": "</s>"}, "config": {"eos_token_id": 258}}, 257),
    ],
)
def test_end_token_is_the_declared_one(tmp_path, files, end):
    write_tokenizer(tmp_path, *ENDS)
    write_files(tmp_path, **files)
    tokenizer = load(tmp_path)
    assert tokenizer.end_id == end
    tokenizer.save(tmp_path / "copy")
    assert load(tmp_path / "copy").end_id == end
    assert load(tmp_path / "copy").fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    "word",
    ["<\uff5cend▁of▁sentence\uff5c>", "<EOS_TOKEN>", "<|bos|>", "<|end_of_text|>", "[SEP]"],
)
def test_usual_names_of_the_end_token_are_known(tmp_path, word):
    assert load(write_tokenizer(tmp_path, "<pad>", word)).end_id == 257


WRONG = [b"null", b"[]", b"7", b'"text"', b'{"a": "caf\xe9"}', b"", b"{", b"[" * 10**5]


@pytest.mark.parametrize(
    "name", ["tokenizer_config", "special_tokens_map", "generation_config", "config"]
)
def test_damaged_file_beside_the_tokenizer_is_named(tmp_path, name):
    write_tokenizer(tmp_path, *ENDS)
    tokens = [{"eos_token": token} for token in (5, [], {}, {"content": 5}, "<none>", True, "")]
    ids = [{"eos_token_id": number} for number in (-1, 259, 2**70, 1.0, "257", True, [], {})]
    declared = tokens if name in ("tokenizer_config", "special_tokens_map") else ids
    for content in [*WRONG, *(json.dumps(found).encode() for found in declared)]:
        (tmp_path / f"{name}.json").write_bytes(content)
        with pytest.raises(InputError, match=rf"/{name}\.json: ") as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value)


def test_file_without_an_end_token_says_how_to_declare_one(tmp_path):
    write_tokenizer(tmp_path, "<fin>")
    with pytest.raises(InputError, match='no end token.*{"eos_token": "..."}'):
        load(tmp_path)
    write_files(tmp_path, tokenizer_config={"eos_token": "<fin>"})
    assert load(tmp_path).end_id == 256


OTHERS = {
    "tokenizer.model": (b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02", "a sentencepiece model"),
    "spiece.model": (b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02", "rename it to "),
    "o200k.tiktoken": (b"IQ== 0\nIg== 1\n", "for tiktoken"),
    "vocab.json": (b'{"a": 0}', "half of a byte-level BPE"),
    "merges.txt": (b"#version: 0.2\n", "half of a byte-level BPE"),
    "encoder.json": (b'{"a": 0}', "half of GPT-2's files"),
    "tekken.json": (b'{"vocab": []}', "Mistral's own kind"),
    "tokenizer.pkl": (b"\x80\x05\x95", "a pickle"),
    "tokenizer.json": (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
    "vocab.txt": (b"[UNK]\n", "the vocabulary of a WordPiece"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_vocabulary_of_another_kind_is_named(tmp_path, name):
    content, what = OTHERS[name]
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(InputError, match=f"/{name}: is .*{what}") as caught:
            load_tokenizer(str(path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["vocab.json", "vocab.txt"])
def test_advice_for_a_vocabulary_works(tmp_path, kind):
    """The command of the message, run as it stands."""
    train_bpe(["the cat"] * 9, 260)._backend.model.save(str(tmp_path))
    if kind == "vocab.txt":
        (tmp_path / kind).write_text("[UNK]\n[SEP]\n[CLS]\nthe\ncat\n")
    with pytest.raises(InputError) as caught:
        load(tmp_path / kind)
    command = str(caught.value).split('python -c "')[1].split('"')[0]
    subprocess.run([sys.executable, "-c", command], check=True)
    assert len(load(tmp_path).encode("the cat")) > 0


def test_panic_of_the_library_is_one_line():
    panic = type("PanicException", (BaseException,), {})
    with (
        pytest.raises(InputError, match=r"tokenizer x: fails \(slice\); mend"),
        one_line("tokenizer x: fails", "mend it"),
    ):
        raise panic("slice\nbacktrace")
    with pytest.raises(KeyboardInterrupt), one_line("what", "advice"):
        raise KeyboardInterrupt


def test_hub_tokenizer_has_its_declared_end_token(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    write_files(write_tokenizer(tmp_path, *ENDS), tokenizer_config={"eos_token": "</s>"})

    def snapshot_download(name, *, revision, allow_patterns):
        assert name == "owner/name" and "tokenizer_config.json" in allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    tokenizer = load_tokenizer("owner/name")
    assert (tokenizer.name, tokenizer.end_id) == ("owner/name", 257)


JUNK = st.sampled_from(
    [None, 0, -1, 1e30, "", "x" * 50, [], {}, [1], {"a": 1}, True, 2**32, 2**31 - 1, "\\", "(", "▁"]
)


@st.composite
def damaged(draw, original):
    """A JSON value with one or two parts replaced, removed or doubled."""
    value = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 2))):
        at, inside = value, True
        while inside:
            key = draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
            inside = isinstance(at[key], dict | list) and at[key] and draw(st.integers(0, 3))
            at, parent = at[key], at
        action = draw(st.sampled_from(["replace", "replace", "remove", "double"]))
        if action == "remove":
            del parent[key]
        elif isinstance(parent, list) and action == "double":
            parent.insert(key, parent[key])
        else:
            parent[key] = copy.deepcopy(draw(JUNK))
        if not value:
            break
    return value


@pytest.mark.slow
@pytest.mark.parametrize("make", vocabularies.ALL)
def test_any_json_is_a_tokenizer_or_one_line(tmp_path_factory, make):
    folder = tmp_path_factory.mktemp("fuzz")
    original = json.loads(make().to_str())

    @settings(max_examples=300, deadline=None)
    @given(content=damaged(original), config=damaged({"eos_token": {"content": "</s>"}, "a": 1}))
    def fuzz(content, config):
        write_files(folder, tokenizer=content, tokenizer_config=config)
        try:
            tokenizer = load(folder)
            tokenizer.decode(tokenizer.encode(vocabularies.PARAGRAPH))
        except InputError as error:
            assert "\n" not in str(error)

    fuzz()
