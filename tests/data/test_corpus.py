import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import vocabularies
from texts import DOCUMENTS, split_texts, write_files, write_jsonl
from tokenizers import decoders, pre_tokenizers

from inl_jax.config import DataConfig, InputError
from inl_jax.data import corpus
from inl_jax.text.sources import Entry, find_entries
from inl_jax.tokens.tokenizer import Tokenizer, load

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("fraction", "split"), [(0.0, "train"), (1.0, "validation")])
def test_fraction_of_0_or_1_gives_everything_to_one_split(make_corpus, tmp_path, fraction, split):
    file = write_files(tmp_path / "one", ["only this\nfile\n"]) / "000.txt"
    for path, texts in ((file, ["only this\nfile\n"]), (write_files(tmp_path / "d"), DOCUMENTS)):
        (source,) = make_corpus(path, validation_fraction=fraction).sources
        assert split_texts(source, split) == texts
        other = source.open("validation" if split == "train" else "train")[:]
        assert other.shape == (0,) and other.dtype == np.uint16


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_neither_split_is_empty_if_documents_differ(make_corpus, tmp_path, fraction):
    few = write_jsonl(tmp_path / "a.jsonl", ["a", "b", "c"])
    (source,) = make_corpus(few, validation_fraction=fraction).sources
    texts = split_texts(source, "train"), split_texts(source, "validation")
    assert sorted(map(len, texts)) == [1, 2]
    assert sorted(texts[0] + texts[1]) == ["a", "b", "c"]
    assert source.documents == 3
    same = write_jsonl(tmp_path / "b.jsonl", ["a", "a"])  # nothing to tell them apart
    (source,) = make_corpus(same, validation_fraction=fraction).sources
    assert split_texts(source, "train") == ["a", "a"]


def test_a_file_without_text_does_not_fill_a_split(make_corpus, tmp_path):
    folder = write_files(tmp_path / "d", ["a", "b", "\ufeff"])  # the last has the highest hash
    (source,) = make_corpus(folder, validation_fraction=1 - 1e-9).sources
    assert sorted(split_texts(source, "train") + split_texts(source, "validation")) == ["a", "b"]
    assert source.train_tokens == source.validation_tokens


def test_no_text_is_encoded_twice_to_leave_neither_split_empty(make_corpus, tmp_path, monkeypatch):
    encoded = []
    real = Tokenizer.encode_batch
    monkeypatch.setattr(
        Tokenizer, "encode_batch", lambda self, texts: encoded.extend(texts) or real(self, texts)
    )
    monkeypatch.setattr(corpus, "_try_round_trip", lambda texts, tokenizer: {})
    make_corpus(write_files(tmp_path / "d"), validation_fraction=1e-9)
    assert sorted(filter(None, encoded)) == sorted(DOCUMENTS)


def test_batches_leave_no_trace_in_the_cache(make_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "SAMPLED_BYTES", 700)
    folder, found = write_files(tmp_path / "d"), []
    for size in (1, 1000, 2**18):
        monkeypatch.setattr(corpus, "BATCH_BYTES", size)
        (source,) = make_corpus(folder).sources
        found.append({file.name: file.read_bytes() for file in source.directory.iterdir()})
        shutil.rmtree(source.directory)
    assert found[0] == found[1] == found[2] and source.samples > 8


def test_weights_give_one_source_per_path_and_one_tokenizer(make_corpus, tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", ["aaaa bbbb " * 50, "aaaa"])
    b = write_jsonl(tmp_path / "b.jsonl", ["cccc dddd " * 50, "cccc"])
    both = make_corpus(a, b, weights=(3.0, 1.0), tokenizer="bpe:280")
    assert both.weights == (3.0, 1.0) and len(both.sources) == 2
    joined = make_corpus(a, b, tokenizer="bpe:280")
    assert joined.weights == (1.0,) and len(joined.sources) == 1
    assert joined.tokenizer.fingerprint == both.tokenizer.fingerprint
    for source, word in zip(both.sources, ("aaaa", "cccc"), strict=True):
        saved = load(source.directory)
        assert (saved.name, saved.fingerprint) == ("bpe:280", both.tokenizer.fingerprint)
        assert len(saved.encode(word)) == 1  # merged: both paths were trained on
        texts = split_texts(source, "train", saved) + split_texts(source, "validation", saved)
        assert len(texts) == 2 and all(text.startswith(word) for text in texts)


def test_bpe_sample_spans_the_corpus_within_its_bound(make_corpus, tmp_path, monkeypatch):
    seen = []
    real = corpus.tokenizers.train_bpe
    monkeypatch.setattr(
        corpus.tokenizers, "train_bpe", lambda texts, size: real(seen.extend(texts) or seen, size)
    )
    monkeypatch.setattr(corpus, "BPE_SAMPLE_BYTES", 2000)
    documents = [f"{i:04} " + "x" * 95 for i in range(200)]
    make_corpus(write_files(tmp_path / "d", documents), tokenizer="bpe:260")
    assert 1500 <= sum(map(len, seen)) <= 2100
    assert seen[0] == documents[0] and seen[-1] in documents[-20:]


@pytest.mark.parametrize("name", ["bpe:many", "bpe:", "bpe:256"])
def test_bpe_with_a_bad_size_is_named(make_corpus, tmp_path, name):
    with pytest.raises(InputError, match=f"data.tokenizer={name}"):
        make_corpus(write_jsonl(tmp_path / "a.jsonl"), tokenizer=name)


def test_fingerprint_depends_on_content_and_not_on_place_or_time(make_corpus, tmp_path):
    a, b = write_files(tmp_path / "a"), write_files(tmp_path / "b" / "c")
    os.utime(b / "001.txt", (1, 1))
    one, two = make_corpus(a), make_corpus(b)
    assert one.fingerprint == two.fingerprint
    assert one.sources[0].directory != two.sources[0].directory
    (b / "001.txt").write_text("else")
    assert make_corpus(b).fingerprint != one.fingerprint
    assert make_corpus(a, tokenizer="gpt2").fingerprint != one.fingerprint
    assert make_corpus(a, validation_fraction=0.1).fingerprint != one.fingerprint


# Fingerprints of the first release, keys of format 2: a change makes every user tokenise again.
TEXTS = [f"line {i}: naïve 猫 🙂\r\n" for i in range(20)]
PINNED = {
    ("file", "bytes"): ("fc40fe011ee77bbf1e50c850da199c75", "6342c28fe6107e36b537c7593df3c305"),
    ("files", "bytes"): ("453b3995286dfd51426d64f61ad8f35c", "6342c28fe6107e36b537c7593df3c305"),
    ("file", "bpe:270"): ("d309fb26c75dc8226588404e035e937b", "a0315ab29fc8684e2a3915a0664ed374"),
    ("files", "bpe:270"): ("673bba68701fb957e64eb7c9f60dcc9c", "81ddc365108d647150b382758840a33b"),
}


@pytest.mark.parametrize(("kind", "tokenizer"), PINNED)
def test_fingerprints_and_cache_keys_never_change(
    make_corpus, tmp_path, monkeypatch, kind, tokenizer
):
    monkeypatch.setattr(Entry, "identity", lambda self: ["", [["/a.txt", 12, 34]]])
    documents = TEXTS if kind == "files" else ["".join(TEXTS)]
    path = write_files(tmp_path / "d", documents)
    path = path / "000.txt" if kind == "file" else path
    made = make_corpus(path, tokenizer=tokenizer, validation_fraction=0.25)
    (source,) = made.sources
    assert (made.fingerprint, source.directory.name) == PINNED[kind, tokenizer]
    if tokenizer.startswith("bpe:"):
        assert (source.directory.parent / "tokenizer-6ff2cb7385beb87f264bb4fc5af53efa").is_dir()


def test_progress_is_lines_elsewhere_and_a_bar_on_a_terminal(
    make_corpus, tmp_path, monkeypatch, capsys, said
):
    monkeypatch.setattr(corpus, "BATCH_BYTES", 1000)
    folder = write_files(tmp_path / "d")
    make_corpus(folder)  # far less than ten seconds
    assert len(said) == 1 and said[0].startswith("data: 40 documents, ")
    assert "bytes per token" in said[0]
    monkeypatch.setattr(corpus, "SECONDS_PER_LINE", 0)
    said.clear()
    make_corpus(folder, validation_fraction=0.2)
    assert len(said) > 2 and said[-1].startswith("data: 40 documents, ")
    assert re.fullmatch(r"data: 0 MB, [\d.]+ MB/s, \d+s left of 0 MB", said[0])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stderr, "fileno", lambda: 2, raising=False)
    said.clear()
    make_corpus(folder, validation_fraction=0.1)
    assert len(said) == 1 and "B/s" in capsys.readouterr().err


def test_modules_of_text_and_data_load_no_jax():
    modules = ["text.sources", "text.rows", "text.documents", "tokens.tokenizer"]
    modules += ["tokens.long_documents", "data.cache", "data.corpus", "data.batches"]
    imports = ", ".join(f"inl_jax.{module}" for module in modules)
    code = f"import sys, {imports}; print(*sys.modules)"
    run = {"env": os.environ | {"PYTHONPATH": str(ROOT)}, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code], **run, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "inl_jax" in loaded
    heavy = {"jax", "jaxlib", "flax", "orbax", "optax", "grain", "datasets", "pyarrow"}
    assert not loaded & heavy


def test_prepare_data_script_tells_where_the_tokens_are(tmp_path):
    write_files(tmp_path / "d")
    config = tmp_path / "config.py"
    config.write_text("from inl_jax.config import TrainConfig\nconfig = TrainConfig()\n")
    command = [
        sys.executable,
        ROOT / "scripts" / "prepare_data.py",
        "--config",
        config,
        "--data.tokenizer",
        "bytes",
        "--data.cache_dir",
        tmp_path / "cache",
        "--data.paths",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = {"env": environment, "capture_output": True, "text": True}
    done = subprocess.run([*command, tmp_path / "d"], **run)
    assert done.returncode == 0 and "40 documents, weight 1, uint16" in done.stdout
    done = subprocess.run([*command, tmp_path / "none"], **run)
    assert done.returncode == 2
    assert (
        done.stderr.startswith("error: data.paths: no such file") and done.stderr.count("\n") == 1
    )


PEAK = """
import resource, sys, time
from inl_jax.config import DataConfig
from inl_jax.data.corpus import prepare
started = time.monotonic()
data = DataConfig(paths=(sys.argv[1],), tokenizer=sys.argv[2], cache_dir=sys.argv[3])
(source,) = prepare(data).sources
seconds = time.monotonic() - started
size = source.train_bytes + source.validation_bytes
print(f"{size / 1e6:.0f} MB in {seconds:.0f} s, {size / 1e6 / seconds:.1f} MB/s", file=sys.stderr)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # KiB
"""


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:4096"])
def test_memory_does_not_grow_with_the_corpus(tmp_path, tokenizer):
    """1 GB of text: bytes takes seconds, bpe:4096 some minutes. Peak memory below 1 GiB."""
    sources = [file.read_text() for file in find_entries(["stdlib"], DataConfig())[0].files]
    size = number = 0
    with open(tmp_path / "big.txt", "w") as big:
        while size < 10**9:
            text = sources[number % len(sources)].replace("self", f"name{number}")
            size += big.write(f"{number}\n{text}\n")
            number += 1
    command = [sys.executable, "-c", PEAK, tmp_path / "big.txt", tokenizer, tmp_path / "cache"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    peak = int(done.stdout.splitlines()[-1])
    print(f"{tokenizer}: peak {peak / 2**10:.0f} MiB\n{done.stdout}")
    assert peak < 2**20


def test_prepare_says_if_no_text_is_left_for_validation(make_corpus, tmp_path, said):
    """Equal documents hash alike, and all of them train."""
    (tmp_path / "d").mkdir()
    for i in range(3):
        (tmp_path / f"d/{i}.txt").write_text("the same text in every document")
    for _ in range(2):  # also when the tokens are found in the cache
        said.clear()
        (source,) = make_corpus(tmp_path / "d", validation_fraction=0.1).sources
        assert source.validation_tokens == 0 and source.train_tokens > 0
        assert sum(line.startswith("WARNING: no text is left for valid") for line in said) == 1
    said.clear()
    make_corpus(tmp_path / "d", validation_fraction=0)
    assert not any("WARNING" in line for line in said), "nobody asked for validation"


def test_prepare_trains_a_damaged_bpe_again(make_corpus, tmp_path):
    write_files(tmp_path / "d", DOCUMENTS)
    first = make_corpus(tmp_path / "d", tokenizer="bpe:270").tokenizer
    (file,) = (tmp_path / "cache").glob("tokenizer-*/tokenizer.json")
    for damage in (lambda: file.write_text(file.read_text()[:99]), file.unlink):
        damage()
        assert (
            make_corpus(tmp_path / "d", tokenizer="bpe:270").tokenizer.vocab_size
            == first.vocab_size
        )


def test_lossy_tokenizer_is_said_whenever_its_tokens_are_used(make_corpus, tmp_path, said):
    texts = [vocabularies.PARAGRAPH * 3, "Straße " * 20]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    for make in vocabularies.ALL:
        tokenizer = Tokenizer(make.__name__, make())
        for _ in range(2):  # also when they are found in the cache
            said.clear()
            (source,) = make_corpus(path, using=tokenizer, validation_fraction=0).sources
            warnings = [line for line in said if "WARNING" in line]
            assert len(warnings) == (make.__name__ in ("wordpiece", "unigram")), warnings
        if make.__name__ == "wordpiece":
            unknown = sum(list(tokenizer.encode(t)).count(tokenizer.unknown_id) for t in texts)
            assert source.unknown_tokens == unknown > 0
            assert warnings[0].startswith("WARNING: tokenizer wordpiece loses text: ")
            assert warnings[0].endswith(
                "2 of 2 samples of the text do not come back when decoded; bits per byte does not "
                "count"
            )


def test_bpe_of_another_user_is_not_removed(make_corpus, tmp_path, monkeypatch):
    folder = write_files(tmp_path / "d", DOCUMENTS)
    make_corpus(folder, tokenizer="bpe:270")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    (kept,) = (tmp_path / "cache").glob("tokenizer-*")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(InputError, match="tokenizer.json: .*Permission denied"):
            make_corpus(folder, tokenizer="bpe:270")
    assert kept.is_dir()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda file: file.write_text("other"), "changed while it was read"),
        (lambda file: file.unlink(), "b.txt was removed while it was read"),
    ],
    ids=["written", "removed"],
)
def test_text_that_changes_while_it_is_read_is_not_kept(
    make_corpus, tmp_path, monkeypatch, change, found
):
    folder = tmp_path / "d"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.txt").write_text(name)
    read = corpus.read_documents

    def disturbed(*args):
        for number, document in enumerate(read(*args)):
            if number == 0:
                change(folder / "b.txt")
            yield document

    monkeypatch.setattr(corpus, "read_documents", disturbed)
    with pytest.raises(InputError, match=found):
        make_corpus(folder)


def test_space_that_a_tokenizer_puts_before_a_text_is_no_loss(make_corpus, tmp_path, said):
    split = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend = vocabularies.bpe(split=split, decoder=decoders.ByteLevel())
    tokenizer = Tokenizer("prefix", backend)
    path = write_jsonl(tmp_path / "a.jsonl", [vocabularies.PARAGRAPH])
    (source,) = make_corpus(path, using=tokenizer, validation_fraction=0).sources
    assert source.samples == 1 and source.lossy_samples == 0
