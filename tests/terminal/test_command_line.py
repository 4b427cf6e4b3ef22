import importlib
import inspect

import pytest

from inl_jax.cli import main
from inl_jax.config import InputError
from inl_jax.terminal.command_line import Parser, add_depth_flags, at_depth, with_underscores

REQUIRED = {
    "train": ["--config", "tiny"],
    "prepare": ["--config", "tiny"],
    "estimate": ["--config", "tiny"],
    "preflight": ["--config", "tiny"],
    "evaluate": ["--checkpoint", "nowhere"],
    "generate": ["--checkpoint", "nowhere"],
    "plot": ["nowhere"],
    "report": ["nowhere"],
    "verify": ["nowhere"],
    "inspect": ["nowhere", "--prompt", "x"],
    "import": ["--weights", "w.pt", "--num_iterations", "3", "--out", "nowhere"],
    "export": ["--checkpoint", "x", "--out", "y"],
}


@pytest.fixture
def flags_of(monkeypatch):
    """The flags in full of each verb, as its parser holds them."""

    def find(verb):
        made, old = [], Parser.__init__

        def init(self, *args, **settings):
            old(self, *args, **settings)
            made.append(self)

        with monkeypatch.context() as patch, pytest.raises((InputError, SystemExit)):
            patch.setattr(Parser, "__init__", init)
            module = importlib.import_module(
                f"inl_jax.cli.{'import_' * (verb == 'import') or verb}"
            )
            module.main(["--help"])
        return [flag for flag in made[0]._option_string_actions if flag.startswith("--")]

    return find


@pytest.mark.parametrize("verb", main.VERBS)
def test_no_verb_takes_an_abbreviated_flag(inl, flags_of, verb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = flags_of(verb)
    assert flags
    if verb in ("train", "prepare", "estimate", "preflight"):
        flags += ["--optim.learning_rate", "--data.paths", "--num_steps"]
    for flag in flags:
        code, _, err = inl(verb, *REQUIRED[verb], flag[:-1], "1")
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, (flag, err)
        if flag[:-1] not in flags:
            assert flag[:-1] in err, (flag, err)


def test_every_verb_of_the_list_has_one_file():
    for verb in main.VERBS:
        module = importlib.import_module(f"inl_jax.cli.{'import_' * (verb == 'import') or verb}")
        assert list(inspect.signature(module.main).parameters) == ["argv"]


def test_dashes_in_a_flag_are_underscores_and_values_stay():
    words = ["--run-dir", "a-b", "--data.seq-len=3", "--xla-flags=--xla-a=1", "-x-y", "c-d=e-f"]
    assert with_underscores(words) == [
        "--run_dir",
        "a-b",
        "--data.seq_len=3",
        "--xla_flags=--xla-a=1",
        "-x-y",
        "c-d=e-f",
    ]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["train", "tiny", "--seed", "1"], "tiny: write --config tiny"),
        (["estimate", "configs/3b.py"], "configs/3b.py: write --config configs/3b.py"),
        (
            ["generate", "--checkpoint", "x", "--wholly_other"],
            "--wholly_other: no such flag; --help",
        ),
        (["train", "--confg", "tiny"], "--confg: no such flag; the closest is --config"),
        (["train", "--dry_run"], "--config is missing: name a file, or one of 3b,"),
        (["train", "--config", "tiny", "--dry-ru"], "--dry_ru: no such flag; the closest is --dry"),
        (["train", "--config", "tiny", "--num", "5"], "--num: no such flag; "),
        (["evaluate"], "name a run directory: inl evaluate RUN"),
        (["generate", "--wholly_other"], "name a run directory: inl generate RUN"),
        (["evaluate", "x", "y"], "y: no such flag"),
        (["evaluate", "--checkpoint", "x", "--steps", "1"], "the closest is --step"),
        (["evaluate", "--checkpoint", "x", "--batch_size", "0"], "--batch_size 0: must be posit"),
        (["generate", "--checkpoint", "x", "--top-k", "many"], "--top_k: invalid int value"),
        (["plot"], "required: run_dir"),
        (["report"], "required: RUN"),
        (["import", "--weights", "w"], "required: --out"),
        (["estimate", "--config", "tiny", "--devices", "0"], "--devices 0: must be from 1"),
    ],
)
def test_mistake_in_a_flag_is_one_line_and_exit_code_2(inl, argv, named):
    code, out, err = inl(*argv)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert named in err


def test_help_shows_the_defaults(inl):
    code, out, _ = inl("generate", "--help")
    out = " ".join(out.split())  # lines are wrapped
    assert code == 0 and "(default: 128)" in out
    assert "likeliest; 0: all (default: 0)" in out and "decides the draw (default: 0)" in out
    assert not any(f"(default: {useless})" in out for useless in (None, False, [], ""))


@pytest.mark.parametrize(
    "argv",
    [
        ["evaluate", "a\0"],
        ["generate", "--checkpoint=\udce9"],
        ["plot", "x" * 300],
        ["plot", "run", "~nobody-is-called-so/loss.png"],
        ["report", "run", "a\0"],
        ["inspect", "run", "--prompt", "x", "--out", "a\0.html"],
        ["import", "--weights", "a\0", "--num_iterations", "3", "--out", "out"],
        ["import", "--weights", "a", "--num_iterations", "3", "--out", ""],
        ["estimate", "--config", "tiny", "--mfu_from", "\udce9"],
        ["train", "--config", "a\0"],
        ["train", "--config", "tiny", "--run_dir", "\udce9"],
        ["prepare", "--config", "tiny", "--data.cache_dir", "a\0"],
    ],
)
def test_path_that_no_file_can_have_is_one_line_and_exit_code_2(inl, argv):
    code, out, err = inl(*argv)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1


def test_paths_of_flags_may_begin_with_a_tilde(inl, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    code, _, err = inl("plot", "~/nothing")
    assert code == 2 and f"{tmp_path}/nothing" in err
    parser = Parser("x", None)
    parser.add_run()
    assert parser.parse_flags(["--checkpoint=~/a"]).checkpoint == tmp_path / "a"
    assert parser.parse_flags(["~/a"]).checkpoint == tmp_path / "a"


@pytest.fixture
def depth():
    """Reads `--iterations` and `--tol`, and applies them to a model."""
    parser = Parser("x", None)
    add_depth_flags(parser)
    return lambda model, *argv: at_depth(model, parser.parse_flags(argv))


def test_depth_flags_change_iterations_and_tol_alone(model_config, depth):
    model = model_config()
    assert depth(model) == model
    assert depth(model, "--iterations", "7") == model_config(num_iterations=7)
    assert depth(model, "--tol", "0.5") == model_config(tol=0.5)
    assert depth(model, "--iterations", "0") == model_config(num_iterations=0)


@pytest.mark.parametrize(
    ("fields", "argv", "named"),
    [
        ({"num_iterations": 0}, "--iterations 3", "--iterations 3: the model has no integrator"),
        ({"num_iterations": 0}, "--tol 0.1", "--tol 0.1: the model has no integrator"),
        ({"context": "mean"}, "--iterations 0", "--iterations 0: must be at least 1 with"),
        ({}, "--iterations -1", "--iterations -1: must be at least 0"),
        ({}, "--tol -1", "model.tol=-1.0: must be 0 or more"),
        ({}, "--tol 1 --iterations 0", "model.tol=1.0 with model.num_iterations=0"),
    ],
)
def test_depth_that_a_model_cannot_have_is_named(model_config, depth, fields, argv, named):
    with pytest.raises(InputError, match=named):
        depth(model_config(**fields), *argv.split())
