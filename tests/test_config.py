import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from inl_jax.config import InputError, ModelConfig, TrainConfig, differences, from_json, to_json
from inl_jax.config_file import load_config, override
from inl_jax.model.language_model import param_count
from inl_jax.parallel.sharding import make_mesh
from inl_jax.planning.preflight import check_machine
from inl_jax.training.state import make_layout

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_loads_by_path_and_by_name(path):
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
        ("model.context", "decay", "mean"),
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
        ("model.context=foo", ["model.context", "'foo'", "'attention'"]),
        ("--optim.learning_rate", ["optim.learning_rate"]),
        ("optim.learning_rate=nan", ["optim.learning_rate=nan"]),
        ("optim.weight_decay=inf", ["optim.weight_decay=inf"]),
        ("optim.learning_rate=-1", ["optim.learning_rate=-1"]),
        ("model.num_heads=5", ["model.num_heads=5", "model.d_model=128"]),
        ("model.num_kv_heads=3", ["model.num_kv_heads=3", "model.num_heads=4"]),
        ("data.seq_len=513", ["data.seq_len=513", "model.max_seq_len=512"]),
        ("optim.warmup_steps=450", ["optim.warmup_steps=450", "num_steps=450"]),
        ("model.num_iterations=0 model.context=mean", ["model.num_iterations=0", "context=mean"]),
        ("num_epochs=2", ["num_steps=450", "num_epochs=2.0"]),
        ("num_steps=0", ["num_steps=0", "num_epochs=0.0"]),
        ("accumulate_steps=5", ["batch_size=16", "accumulate_steps=5"]),
        ("data.weights=0", ["data.weights=(0.0,)"]),
        ("data.validation_fraction=1.5", ["data.validation_fraction=1.5"]),
        ("model.param_dtype=auto", ["model.param_dtype=auto"]),
        ("mesh.fsdp=0", ["mesh.fsdp=0"]),
        ("model.attention_kernel=flash", ["model.attention_kernel", "'flash'", "'cudnn'"]),
        ("xla_flags=fast", ["xla_flags=fast", "--xla_name=value"]),
    ],
)
def test_a_mistake_is_one_line_that_names_field_and_value(overrides, named):
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
    ],
)
def test_a_config_file_that_is_missing_raises_or_assigns_nothing(tmp_path, text, named):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_config(path)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_a_value_may_hold_an_equals_sign():
    config = override(
        TrainConfig(),
        [
            "--run_dir",
            "runs/lr=1e-3",
            "--data.paths",
            "/d/lang=en/*.parquet",
            "lang=fr/x.txt",
            "--sample_prompt",
            "seed = 1",
            "--name=seed=2",
            "batch_size=6",
            "optim.b1=.5",
        ],
    )
    assert config.data.paths == ("/d/lang=en/*.parquet", "lang=fr/x.txt")
    assert (config.run_dir, config.sample_prompt) == ("runs/lr=1e-3", "seed = 1")
    assert (config.name, config.batch_size, config.optim.b1) == ("seed=2", 6, 0.5)


def test_json_round_trip():
    config = override(
        TrainConfig(model=ModelConfig(kappa=math.inf)),
        ["--data.paths", "a", "b", "--data.weights", "1", "2", "--mesh.data", "2"],
    )
    assert from_json(to_json(config)) == config
    with pytest.raises(InputError, match="model.colour"):
        from_json('{"model": {"colour": 1}}')


def test_differences_name_dotted_fields_and_both_values():
    config = TrainConfig()
    other = dataclasses.replace(config, seed=7, model=ModelConfig(d_ff=64))
    assert list(differences(config, config)) == []
    assert list(differences(config, other)) == [("model.d_ff", 512, 64), ("seed", 0, 7)]


def run_script(*args, cwd):
    return subprocess.run(
        [sys.executable, ROOT / "scripts/train.py", *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )


@pytest.mark.parametrize(
    "overrides, named",
    [
        ("--optim.lerning_rate 1", "--optim.learning_rate"),
        # 2,000 GB of weights: an allocation would not survive to the message.
        ("--model.d_model 98304 --model.d_ff 393216 --model.num_heads 768", "needs"),
    ],
    ids=["typo", "too large"],
)
def test_the_script_answers_a_mistake_with_one_line_and_exit_code_2(tmp_path, overrides, named):
    done = run_script("--config", ROOT / "configs/tiny.py", *overrides.split(), cwd=tmp_path)
    assert done.returncode == 2
    assert named in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_memory_that_does_not_suffice_names_needed_and_found(tmp_path):
    config = load_config(
        "tiny", ["model.d_model=98304", "model.num_heads=768", f"run_dir={tmp_path}/r"]
    )
    with pytest.raises(InputError, match=r"tiny needs \d+\.\d\d GiB .* \d+\.\d\d GiB was found"):
        mesh = make_mesh(config.mesh)
        check_machine(config, mesh, make_layout(config, mesh), report=lambda line: None)
    assert not (tmp_path / "r").exists()


def test_help_lists_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        override(TrainConfig(), ["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    config = TrainConfig()
    for field in dataclasses.fields(config):
        section = getattr(config, field.name)
        if dataclasses.is_dataclass(section):
            names = [f"--{field.name}.{inner.name}" for inner in dataclasses.fields(section)]
        else:
            names = [f"--{field.name}"]
        for name in names:
            assert name in shown


def test_the_script_applies_the_compiler_flags_of_the_config_before_jax_starts(tmp_path):
    flags = "--xla_flags=--xla_gpu_enable_latency_hiding_scheduler=true --xla_made_up=1"
    done = run_script("--config", "tiny", "--dry_run", flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "WARNING: XLA here does not take --xla_made_up=1" in done.stdout
    assert "--xla_gpu_enable_latency_hiding_scheduler=true\n" in done.stdout


def test_dry_run_says_size_and_memory_and_creates_nothing(tmp_path):
    done = run_script("--config", "tiny", "--dry_run", "--run_dir", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{param_count(load_config('tiny').model):,} parameters" in done.stdout
    assert "GiB" in done.stdout and "found" in done.stdout
    assert list(tmp_path.iterdir()) == []
