import concurrent.futures
import math
import os
import sys
from pathlib import Path

import jax
import pytest

from inl_jax.config import InputError, TrainConfig
from inl_jax.config_file import (
    as_overrides,
    differences,
    load_config,
    override,
    presets,
    read_lab_note,
)
from inl_jax.model.language_model import param_count
from inl_jax.model.platform.device import H100, made_for
from inl_jax.parallel.sharding import fit_to_mesh, make_mesh
from inl_jax.planning.memory import memory_needed
from inl_jax.planning.recipe import choose
from inl_jax.training.state import make_layout

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_load_config_takes_a_path_or_a_name(path):
    assert load_config(path) == load_config(path.stem)
    assert load_config(path).name == path.stem


@pytest.mark.parametrize(
    "overrides",
    [
        ["--optim.learning_rate", "3e-5", "--model.context", "mean"],
        ["optim.learning_rate=3e-5", "model.context=mean"],
        ["--optim.learning_rate=3e-5", "model.context=mean"],
    ],
)
def test_overrides_change_the_named_fields_and_nothing_else(overrides):
    old, new = load_config("tiny"), load_config("tiny", overrides)
    assert list(differences(old, new)) == [
        ("model.context", "gated", "mean"),
        ("optim.learning_rate", old.optim.learning_rate, 3e-5),
    ]


def test_overrides_reach_every_type_of_field():
    config = override(
        TrainConfig(),
        [
            "--data.paths",
            "a.txt",
            "b.txt",
            "--data.weights",
            "1",
            "2",
            "--mesh.data",
            "4",
            "--model.kappa",
            "inf",
            "run_dir=a=b",
            "--xla_flags=--xla_a=1 --xla_b=2",
        ],
    )
    assert config.xla_flags == ("--xla_a=1 --xla_b=2",)
    assert config.data.paths == ("a.txt", "b.txt") and config.data.weights == (1.0, 2.0)
    assert (config.mesh.data, config.model.kappa, config.run_dir) == (4, math.inf, "a=b")


@pytest.mark.parametrize(
    "overrides, named",
    [
        ("optim.lerning_rate=1", ["--optim.lerning_rate", "--optim.learning_rate"]),
        ("optim.learning_rate=abc", ["optim.learning_rate", "'abc'"]),
        ("batch_size=1.5", ["batch_size", "1.5"]),
        ("model.context=foo", ["model.context='foo'", "mean, decay, gated, attention"]),
        ("--optim.learning_rate", ["optim.learning_rate"]),
        ("optim.learning_rate=nan", ["optim.learning_rate=nan"]),
        ("optim.weight_decay=inf", ["optim.weight_decay=inf"]),
        ("optim.learning_rate=-1", ["optim.learning_rate=-1"]),
        ("model.num_heads=5", ["model.num_heads=5", "model.d_model=128"]),
        ("model.num_kv_heads=3", ["model.num_kv_heads=3", "model.num_heads=4"]),
        ("data.seq_len=513", ["data.seq_len=513", "model.max_seq_len=512"]),
        ("optim.warmup_steps=450", ["optim.warmup_steps=450", "num_steps=450"]),
        ("model.num_iterations=0 model.context=mean", ["model.num_iterations=0", "context=mean"]),
        *(
            (
                f"model.attention_every=1 model.context={context}",
                ["write --model.context attention"],
            )
            for context in ("gated", "mean", "attention")
        ),
        ("model.attention_every=-2", ["model.attention_every=-2"]),
        ("model.attention_every=3", ["model.attention_every=3", "model.num_layers=4"]),
        *(
            (f"model.attention_every=2 model.context={context}", [f"model.context={context}", "0"])
            for context in ("mean", "attention")
        ),
        ("model.tol=0.1", ["model.tol=0.1", "--tol"]),
        ("model.tol=-1", ["model.tol=-1"]),
        ("model.tol=nan", ["model.tol=nan"]),
        ("model.tol=1 model.num_iterations=0", ["model.tol=1.0", "model.num_iterations=0"]),
        ("num_epochs=2", ["num_steps=450", "num_epochs=2.0"]),
        ("num_steps=0", ["num_steps=0", "num_epochs=0.0"]),
        ("accumulate_steps=5", ["batch_size=16", "accumulate_steps=5"]),
        ("data.weights=0", ["data.weights=(0.0,)"]),
        ("data.validation_fraction=1.5", ["data.validation_fraction=1.5"]),
        ("model.param_dtype=auto", ["model.param_dtype=auto"]),
        ("mesh.fsdp=0", ["mesh.fsdp=0"]),
        ("model.attention_kernel=flash", ["model.attention_kernel='flash'", "auto, cudnn, xla"]),
        ("xla_flags=fast", ["xla_flags=fast", "--xla_name=value"]),
    ],
)
def test_load_config_names_field_and_value_of_a_mistake(overrides, named):
    with pytest.raises(InputError) as caught:
        load_config("tiny", overrides.split())
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300
    assert all(part in message for part in named), message


@pytest.mark.parametrize(
    "text, named",
    [
        (None, "no such file"),
        ("1 / 0", "ZeroDivisionError"),
        ("configuration = 1", "config = TrainConfig"),
        ("config = {}", "config = TrainConfig"),
        ("from inl_jax.config import *\nconfig = TrainConfig(batch_size=0)", "batch_size=0"),
        ("config = (", "SyntaxError"),
        ("import sys\nsys.exit(0)", "SystemExit"),
        ("raise SystemExit", "SystemExit"),
        ("raise ValueError('two\\nlines')", "two"),
        ("def f(): return f()\nf()", "RecursionError"),
        ("x = '\udce9'", "SyntaxError"),
        ("config = '\0'", "SyntaxError"),
        ("import nowhere", "ModuleNotFoundError"),
        ("from inl_jax.config import *\nclass A(TrainConfig): pass\nconfig = A()", "TrainConfig"),
        ("from inl_jax.config import *\nconfig = TrainConfig(batch_size=10**5000)", "batch_size"),
    ],
)
def test_load_config_names_a_file_that_is_missing_raises_or_assigns_nothing(tmp_path, text, named):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_bytes(os.fsencode(text))
    with pytest.raises(InputError) as caught:
        load_config(path)
    assert named in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize(
    "path", ["", "a\0", "\udce9", "x" * 300, "~nobody-is-called-so", ".", None, 3, b"tiny"]
)
def test_load_config_answers_an_impossible_path_with_one_line(path):
    with pytest.raises(InputError, match="config") as caught:
        load_config(path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("overrides", ["seed=1", [1], [None], [b"seed=1"], ["stray"], ["--seed"]])
def test_load_config_answers_impossible_overrides_with_one_line(overrides):
    with pytest.raises(InputError) as caught:
        load_config("tiny", overrides)
    assert str(caught.value).isprintable()


def test_override_takes_words_that_begin_with_a_dash():
    words = ["--sample_prompts", "- an item", "-1", "--optim.learning_rate", "1e-3", "--seed=2"]
    config = override(TrainConfig(), words)
    assert config.sample_prompts == ("- an item", "-1") and config.seed == 2
    assert override(config, ["--sample_prompts"]).sample_prompts == ()


def test_override_takes_a_value_with_an_equals_sign():
    config = override(
        TrainConfig(),
        [
            "--run_dir",
            "runs/lr=1e-3",
            "--data.paths",
            "/d/lang=en/*.parquet",
            "lang=fr/x.txt",
            "--sample_prompts",
            "seed = 1",
            "--name=seed=2",
            "batch_size=6",
            "optim.b1=.5",
        ],
    )
    assert config.data.paths == ("/d/lang=en/*.parquet", "lang=fr/x.txt")
    assert (config.run_dir, config.sample_prompts) == ("runs/lr=1e-3", ("seed = 1",))
    assert (config.name, config.batch_size, config.optim.b1) == ("seed=2", 6, 0.5)


@pytest.mark.parametrize("name", presets())
def test_lab_notes_hold_the_figures_of_their_configs(name):
    note, config = read_lab_note(presets()[name]), load_config(name)
    assert note.num_params == param_count(config.model)
    millions = note.num_params / 1e6
    assert note.count == (f"{millions / 1e3:.2f}B" if millions >= 1e3 else f"{millions:.2f}M")
    mesh = make_mesh(config.mesh, devices=jax.devices("cpu")[:1])
    layout = make_layout(config, mesh)
    with made_for(H100):
        config = choose(fit_to_mesh(config, mesh), mesh, layout, 0)  # what needs the least
        needed = memory_needed(config, mesh, layout)
    memory = f"{needed.device_bytes / 2**30:.1f} GiB"
    if needed.host_bytes:
        memory += f" and {needed.host_bytes / 2**30:.1f} GiB of host memory"
    assert note.memory == memory


@pytest.mark.parametrize("name", presets())
def test_lab_notes_name_command_hardware_time_and_loss(name):
    text = presets()[name].read_text().split('"""')[1]
    assert text.startswith(f"{name}: ") and f"\n    inl train --config {name}" in text
    for heading in ("Shape", "Hardware", "Memory", "Time", "Loss"):
        assert f"\n{heading:11}" in text


def test_3b_16gb_says_only_what_differs_from_the_3b():
    names = [name for name, _, _ in differences(load_config("3b"), load_config("3b_16gb"))]
    assert names == [
        "name",
        "model.integrator_segment",
        "model.integrator_chunk",
        "optim.accumulator_dtype",
        "optim.state_memory",
        "run_dir",
    ]


def test_as_overrides_makes_one_config_of_another():
    old, new = load_config("3b"), load_config("3b_16gb", ["data.paths=a b.txt", "optim.eps=1e-7"])
    words = as_overrides(old, new)
    assert words[:2] == ["--name", "3b_16gb"] and override(old, words) == new


def test_configs_load_in_several_threads_and_leave_the_process_alone():
    before = sys.stderr, sys.stdout, list(sys.argv), os.getcwd()

    def load(i):
        flags = [f"seed={i}"] if i % 2 else ["sed=1"]
        try:
            return load_config("tiny", flags).seed
        except InputError as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        found = list(threads.map(load, range(24)))
    assert found[1::2] == list(range(1, 24, 2))
    assert before == (sys.stderr, sys.stdout, sys.argv, os.getcwd())
    assert all("sed=1" in str(message) for message in found[::2]), found
