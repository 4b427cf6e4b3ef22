"""The French guide: its blocks run, its figures are those of `inl estimate`, its spaces hold."""

import importlib.util
import json
import os
import re
import sys
from typing import NamedTuple

import pytest
from inl_process import ROOT, run, run_inl

from inl_jax.failures import EXIT_MISTAKE

PAGE = (ROOT / "docs" / "guide.fr.md").read_text()
PROSE = re.sub(r"^```.*?^```$|`[^`]+`", "", PAGE, flags=re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TESTED = re.compile(
    r"^<!-- testé(?:, code (?P<code>\d+)|, avec (?P<package>\w+))? -->\n"
    r"```(?P<language>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)

# What differs between the page and its test: the size, and how long and how often. Nothing else.
SUBSTITUTIONS = {
    "train --config 3b": "train --config petit.py",
    "train --config 4b": "train --config petit.py",
    "preflight --config 3b": "preflight --config petit.py",
    '"3b"': '"petit.py"',
    "--size 3b": "--size tiny --data.tokenizer bytes --model.d_model 32 --data.seq_len 32",
    "every 500": "every 4",
    "--optim.warmup_steps 1000": "--optim.warmup_steps 2",
    "--num_steps 200000": "--num_steps 12",
}

SMALL = """
from inl_jax.config import DataConfig, ModelConfig, OptimConfig, TrainConfig

config = TrainConfig(
    name="petit",
    model=ModelConfig(
        vocab_size=257, d_model=16, num_layers=1, num_iterations=2, d_ff=32, max_seq_len=512,
        controller_width=8, num_heads=2, num_kv_heads=1, remat="none",
    ),
    data=DataConfig(tokenizer="bytes", seq_len=32, validation_fraction=0.2),
    optim=OptimConfig(warmup_steps=1),
    num_steps=8, batch_size=16, log_every=4, eval_every=4, save_every=4, eval_sequences=16,
    sample_tokens=8,
)
"""


class Block(NamedTuple):
    """A block of the page, where it stands, its exit code, and the optional package it needs."""

    line: int
    language: str
    text: str
    code: int
    package: str | None


def marked_blocks() -> list[Block]:
    """The blocks below a mark, in order."""
    return [
        Block(
            PAGE.count("\n", 0, mark.start("text")) + 1,
            mark["language"],
            mark["text"],
            int(mark["code"] or 0),
            mark["package"],
        )
        for mark in TESTED.finditer(PAGE)
    ]


def substituted(text: str) -> str:
    for old, new in SUBSTITUTIONS.items():
        text = text.replace(old, new)
    return text


def plain(text: str) -> str:
    """The same in one line, with ordinary spaces."""
    return " ".join(text.split())


def estimate(*flags) -> dict:
    """What `inl estimate --json` finds; it may not fit."""
    code, out, err, _ = run_inl("estimate", *flags, "--json")
    assert code in (0, EXIT_MISTAKE), err
    return json.loads(out)


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """The directory of a reader: a clone's script, the text that the page assumes, and `inl`."""
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").table
    names = "corpus simple_french technical_docs all_data data/french_text data/python_code"
    for folder in ("data", "bin", "the-stack/data/python"):
        (tmp_path / folder).mkdir(parents=True)
    for name in names.split():
        lines = (f"{name}, ligne {i} : {i * i} mots de plus." for i in range(200))
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    rows = [f"def f{i}(x):\n    return x + {i}\n" for i in range(100)]
    (tmp_path / "lignes.jsonl").write_text("".join(json.dumps({"text": r}) + "\n" for r in rows))
    parquet.write_table(table({"content": rows}), tmp_path / "the-stack/data/python/0.parquet")
    (tmp_path / "petit.py").write_text(SMALL)
    (tmp_path / "train_inl_llm_large.py").symlink_to(ROOT / "train_inl_llm_large.py")
    for name, command in {"inl": "-m inl_jax", "python3": ""}.items():
        script = tmp_path / "bin" / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {command} "$@"\n')
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.slow
def test_tested_blocks_run_in_the_order_of_the_page(reader):
    programs = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": ["python3", "-c"]}
    for line, language, text, wanted, package in marked_blocks():
        if package and importlib.util.find_spec(package) is None:
            continue
        code, out, err, _ = run(*programs[language], substituted(text), cwd=reader)
        assert code == wanted, f"docs/guide.fr.md:{line} ends with {code}\n{text}\n{out}\n{err}"
    assert (reader / "compare.html").exists()


def test_each_mark_stands_over_a_block_and_each_other_block_is_called_untested():
    assert len(marked_blocks()) == PAGE.count("<!-- testé") >= 20
    tested = {block.text for block in marked_blocks()}
    for block in FENCED.finditer(PAGE):
        before = PAGE[: block.start()].rstrip().rpartition("\n\n")[2]
        assert block[2] in tested or "non testé" in plain(before).lower(), block[0]


def test_each_substitution_matches_a_tested_block():
    text = "".join(block.text for block in marked_blocks())
    assert not [old for old in SUBSTITUTIONS if old not in text]


@pytest.mark.slow
@pytest.mark.parametrize(
    "start, flags",
    {
        "3b, 50 milliards | RTX 4090": "--config 3b_16gb --tokens 50e9 --device rtx4090",
        "3b, 50 milliards | A100 40 Go": "--config 3b --tokens 50e9 --device a100-40gb",
        "3b, 50 milliards | A100 80 Go": "--config 3b --tokens 50e9 --device a100-80gb",
        "3b, 50 milliards | H100": "--config 3b --tokens 50e9 --device h100",
        "4b, 100 milliards | RTX 4090": "--config 4b --tokens 100e9 --device rtx4090 "
        "--optim.state_memory pinned_host --optim.accumulator_dtype bfloat16",
        "4b, 100 milliards | A100 40 Go": "--config 4b --tokens 100e9 --device a100-40gb "
        "--optim.state_memory pinned_host",
        "4b, 100 milliards | A100 80 Go": "--config 4b --tokens 100e9 --device a100-80gb",
        "4b, 100 milliards | H100": "--config 4b --tokens 100e9 --device h100",
    }.items(),
)
def test_costs_of_the_page_are_those_of_estimate(start, flags):
    (row,) = [line for line in map(plain, PAGE.splitlines()) if line.startswith(f"| {start}")]
    for mfu in (0.4, 0.1):
        found = estimate(*flags.split(), "--mfu", mfu)
        cell = f"{found['hours'] / 24:_.0f} jours, {found['price']:_.0f} $"
        assert cell.replace("_", " ") in row


LEAST = " --accumulate_steps 64 --model.remat block"  # the recipe that needs the least memory


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("--config 3b" + LEAST, "| 3,2 Gio | **{device} Gio**"),
        ("--config 4b" + LEAST, "| 4,7 Gio | **{device} Gio**"),
        ("--config 3b --model.remat none", "le 3b demanderait {device} Gio"),
        ("--config 3b --model.context attention" + LEAST, "au moins {device} Gio (prédit)"),
        ("--config 3b --model.context gated" + LEAST, "2 201 731 072 paramètres et {device} Gio"),
        ("--config 3b_16gb" + LEAST, "`3b_16gb`, prédit | {device} Gio | {host} Gio"),
        ("--config 3b", "4 séquences à la fois et prend {device} Gio (prédit)"),
        (
            "--config 3b --optim.state_memory pinned_host" + LEAST,
            "{device} Gio sur la carte et {host} Gio de RAM. Une A100",
        ),
        (
            "--config 4b --optim.state_memory pinned_host" + LEAST,
            "{device} Gio sur la carte et {host} Gio de RAM. Une carte",
        ),
        (
            "--config 3b --model.param_dtype float32 --model.compute_dtype float32" + LEAST,
            "34,6 Gio en précision mixte, {device} Gio tout en float32",
        ),
        ("--config 3b --batch_size 16 --accumulate_steps 1", "passe de {device} à 36,7 Gio"),
        ("--config 3b --batch_size 16 --accumulate_steps 8", "passe de 60,1 à {device} Gio"),
        (
            "--config 4b --optim.state_memory pinned_host --optim.accumulator_dtype bfloat16"
            + LEAST,
            "`--optim.accumulator_dtype bfloat16` : {device} Gio sur la carte et {host} Gio de RAM",
        ),
    ],
)
def test_memory_of_the_page_is_that_of_estimate(flags, sentence):
    found = estimate(*flags.split())
    sizes = {name: found[f"{name}_bytes"] / 2**30 for name in ("device", "host")}
    shown = {name: f"{size:.1f}".replace(".", ",") for name, size in sizes.items()}
    assert sentence.format(**shown) in plain(PAGE)


def test_code_of_the_page_has_ordinary_spaces():
    assert not [
        block[2] for block in FENCED.finditer(PAGE) if re.search("[\u00a0\u202f]", block[2])
    ]


def test_spaces_before_french_punctuation_do_not_break():
    assert not re.findall(r".{0,20}(?: [:;!?»%]|« ).{0,10}", PROSE)


def test_apostrophes_of_the_prose_are_typographic():
    assert not re.findall(".{0,20}'.{0,10}", PROSE)
