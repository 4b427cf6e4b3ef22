"""What a message advises is done to the letter, and then the same command works."""

import json
import re
import shlex
import shutil

import pytest
from conftest import mesh_of

from inl_jax.config import InputError, with_fields
from inl_jax.config_file import load_config, override
from inl_jax.parallel.launch import find_launch
from inl_jax.planning.memory_advice import smallest_change
from inl_jax.questions import read_answers
from inl_jax.storage.run_dir import check_run, read_config
from inl_jax.tokens.tokenizer import load_tokenizer

_FLAGS = r"--[\w.]+(?:=| (?!--))(?:'[^']*'|[\w.:/-]+)"
_FIELDS = r"\b(?:or set|set|or|use) ([a-z_]+(?:\.[a-z_0-9]+)*)(?: to one of: |=| )([\w./:-]+)"


def advised(message):
    """The words of a command line that a message advises: --flag value, or set field=value."""
    advice = message.partition(": ")[2].rpartition("write ")[2]
    if flags := re.findall(_FLAGS, advice):
        return [word for flag in flags for word in shlex.split(flag)]
    return [word for field, value in re.findall(_FIELDS, advice) for word in (f"--{field}", value)]


@pytest.mark.parametrize(
    "words",
    [
        "--num_epochs 2",
        "--num_steps 0",
        "--num_steps 2",
        "--patience 2 --eval_every 0",
        "--patience 2 --data.validation_fraction 0",
        "--sample_every 2 --sample_prompts",
        "--data.phases 1:1 --num_epochs 1 --num_steps 0",
        "--xla_flags fast",
        "--model.num_iterations 0 --model.context mean",
        "--model.attention_every 1",
        "--model.attention_every 2 --model.context mean",
    ],
)
def test_advice_about_a_field_makes_the_config(words):
    with pytest.raises(InputError) as refused:
        load_config("tiny", words.split())
    advice = advised(str(refused.value))
    assert advice and load_config("tiny", [*words.split(), *advice])


@pytest.mark.parametrize(
    "words",
    [
        "--lr 1e-3",
        "--epochs 3",
        "--max_steps 700",
        "--block_size 64",
        "--gradient_accumulation_steps 2",
        "--n_layer 2",
        "--warmup_iters 3",
        "--grad_clip 2",
        "--beta2 0.9",
        "--save_steps 5",
        "--early_stopping_patience 3",
        "--xla_dump_to=there",
        "--data a.txt",
    ],
)
def test_advice_about_a_flag_of_other_programs_makes_the_config(words):
    with pytest.raises(InputError) as refused:
        load_config("tiny", words.split())
    advice = advised(str(refused.value))
    assert advice and load_config("tiny", advice) != load_config("tiny")


@pytest.fixture
def texts(tmp_path):
    """A folder of sources, each of which needs a flag."""
    row = json.dumps({"body": "some text", "other": "more of it"}) + "\n"
    (tmp_path / "columns.jsonl").write_text(row * 3)
    (tmp_path / "bytes.txt").write_bytes(b"some text \xff and more of it" * 9)
    (tmp_path / "splits").mkdir()
    for split in ("test", "validation"):
        (tmp_path / "splits" / f"{split}.jsonl").write_text('{"text": "some text"}\n' * 3)
    return tmp_path


@pytest.mark.parametrize(
    "source, flags",
    [
        ("columns.jsonl", ""),
        ("columns.jsonl", "--data.column text"),
        ("bytes.txt", "--data.bad_utf8 error"),
        ("splits", ""),
        ("splits", "--data.hf_split test[:9]"),
        ("splits", "--data.hf_split test[:9] --data.max_documents 2"),
    ],
)
def test_advice_about_text_prepares_it(inl, texts, source, flags):
    command = ["prepare", "--config", "tiny", "--data.paths", texts / source]
    command += ["--data.tokenizer", "bytes", "--data.cache_dir", texts / "cache", *flags.split()]
    code, _, err = inl(*command)
    advice = advised(err.partition("error: ")[2])
    assert code == 2 and advice
    assert inl(*command, *advice)[0] == 0


@pytest.mark.parametrize(
    "source, flags",
    [("columns.jsonl", ""), ("columns.jsonl", "--data.column text"), ("splits", "")],
)
def test_advice_about_text_to_evaluate_on_is_a_flag_of_evaluate(inl, trained, texts, source, flags):
    command = ["evaluate", trained[1], "--data", texts / source, *flags.split()]
    code, _, err = inl(*command)
    assert code == 2
    assert inl(*command, *advised(err.partition("error: ")[2]))[0] == 0


@pytest.mark.parametrize(
    "source, words", [("columns.jsonl", "--data.column body"), ("splits", "--data.hf_split test")]
)
def test_advice_about_text_is_a_flag_of_the_questions(texts, source, words):
    flags = f"--size tiny --data {texts / source} --epochs 1 --batch_size 8".split()
    answers, fields, asked = read_answers([*flags, *words.split()])
    assert answers["size"] == "tiny" and fields == words.split() and not asked


def test_unknown_checkpoint_is_answered_with_those_that_can_be_read(inl, trained, tmp_path):
    run = shutil.copytree(trained[1], tmp_path / "run")
    (run / "best.json").write_text("damaged")
    _, _, err = inl("verify", run, "--step", "best")
    assert "latest" in err and "the names" not in err  # best is what was asked for
    assert inl("verify", run, "--step", re.search(r"there are \[(\d+)", err)[1])[0] == 0


def test_advice_about_another_tokenizer_comes_before_the_sizes_of_its_model(trained):
    config = read_config(trained[1])
    other = with_fields(config, {"data.tokenizer": "gpt2", "model.vocab_size": 50257})
    with pytest.raises(InputError) as refused:
        check_run(other, load_tokenizer("gpt2"))
    named = re.search(r"add --data.tokenizer (\S+),", str(refused.value))[1]
    check_run(with_fields(config, {"data.tokenizer": named}), load_tokenizer(named))


def test_advice_about_the_model_of_a_run_names_all_that_differs(trained):
    config = read_config(trained[1])
    fields = {"model.context": "gated", "model.num_iterations": 1, "model.dt": 1.0}
    other = with_fields(config, fields | {"model.controller_width": 8})
    with pytest.raises(InputError) as refused:
        check_run(other)
    check_run(override(other, advised(str(refused.value))))


def test_advice_about_memory_takes_no_more_of_the_host_than_there_is(train_config):
    config = train_config(optim={"state_memory": "pinned_host"})
    assert smallest_change(config, mesh_of(), 1 << 40, host=1 << 40)
    assert smallest_change(config, mesh_of(), 1 << 40, host=0) is None


def test_no_processes_at_all_are_refused_by_their_number():
    with pytest.raises(InputError, match="num_processes=0: must be 1 or more"):
        find_launch({}, coordinator="host:1", num_processes=0, process_id=0)


def test_advice_about_a_lone_process_works_as_flag_and_as_variable():
    env = {"PMI_SIZE": "2", "PMI_RANK": "1"}
    with pytest.raises(InputError) as refused:
        find_launch(env)
    assert "--num_processes 1 (or JAX_NUM_PROCESSES=1)" in str(refused.value)
    assert find_launch(env, num_processes=1) is None
    assert find_launch(env | {"JAX_NUM_PROCESSES": "1"}) is None
