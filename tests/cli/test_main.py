import sys

import pytest
from inl_process import ROOT, run, run_inl

import inl_jax
from inl_jax.cli import main
from inl_jax.config_file import presets, read_lab_note

HEAVY = {"jax", "flax", "orbax", "grain", "numpy"}


def loaded_by(code):
    """The heavy packages that a fresh process has loaded after `code`."""
    code = f"import sys\n{code}\nprint(*(set(sys.modules) & {HEAVY}), file=sys.stderr)"
    status, _, err, _ = run(sys.executable, "-c", code)
    assert status == 0, err
    return set(err.split())


@pytest.mark.parametrize("argv", [[], ["train"]])
def test_inl_and_inl_train_without_arguments_list_the_configs(inl, argv):
    code, out, err = inl(*argv)
    assert code == 2 and err == ""
    for name, path in presets().items():
        note = read_lab_note(path)
        row = next(line for line in out.splitlines() if line.split()[:1] == [name])
        assert f"{note.num_params:,} parameters ({note.count})" in row
        assert row.endswith(note.memory)
    assert all(f"\n  inl {verb} " in out for verb in main.VERBS)
    assert out.endswith("  inl train --config tiny\n")


def test_inl_lists_the_configs_without_jax_in_well_under_a_second():
    code, out, _, cpu = run_inl()
    assert code == 2 and "1,698,414,592 parameters (1.70B)" in out and cpu < 0.5
    assert loaded_by("from inl_jax.cli import main; main.run([])") == set()


def test_help_of_train_loads_nothing_heavy():
    code = "import contextlib; from inl_jax.cli import main\n"
    code += "with contextlib.suppress(SystemExit): main.run(['train', '--help'])"
    assert loaded_by(code) == set()


def test_help_of_inl_is_the_list_with_exit_code_0(inl):
    code, out, _ = inl("--help")
    assert code == 0 and "inl train --config tiny" in out


def test_version_is_the_one_of_the_package(inl):
    assert inl("--version") == (0, f"inl_jax {inl_jax.__version__}\n", "")


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["trian"], "inl trian: no such verb; the closest is inl train\n"),
        (["export_torch"], "the closest is inl import\n"),
        (["estimation"], "the closest is inl estimate\n"),
        (["--config", "tiny"], "name a verb first, such as inl train --config tiny\n"),
    ],
)
def test_unknown_verb_is_answered_with_the_closest_one(inl, argv, named):
    code, out, err = inl(*argv)
    assert code == 2 and out == "" and err.startswith("error: ") and err.endswith(named)
    assert err.count("\n") == 1


def doors():
    return sorted((ROOT / "scripts").glob("*.py"))


def test_every_verb_has_a_door_and_every_door_is_three_lines():
    # scripts/inspect.py would hide Python's own module of that name: its door is inspect_run.py.
    assert {door.stem for door in doors()} == {*main.VERBS, *main.SPELLINGS} - {"inspect"}
    for door in doors():
        code = [line for line in door.read_text().splitlines() if line and line[0] != '"']
        verb = main.SPELLINGS.get(door.stem, door.stem)
        assert len(code) == 3 and f'main("{verb}")' in code[-1]


@pytest.mark.parametrize("word", [*main.VERBS, *main.SPELLINGS, "prepare-data"])
def test_every_spelling_of_a_verb_reaches_it(inl, word):
    code, out, _ = inl(word, "--help")
    verb = main.SPELLINGS.get(word.replace("-", "_"), word)
    assert code == 0 and out.startswith(f"usage: inl {verb} ")


@pytest.mark.parametrize("door", doors(), ids=lambda door: door.name)
def test_door_is_the_verb(door, tmp_path):
    code, out, err, cpu = run(sys.executable, door, "--nonsense", "1", cwd=tmp_path)
    assert code == 2 and out == "" and cpu < 1, err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_typo_on_the_command_line_is_answered_in_under_a_second_of_cpu_time():
    code, _, err, cpu = run_inl(
        "train", "--config", ROOT / "configs/tiny.py", "--optim.lerning_rate", 1
    )
    assert code == 2 and "--optim.learning_rate" in err and cpu < 1
    code, _, err, cpu = run_inl("train", "--config", "tiny", "--batch_size", "many")
    assert code == 2 and "batch_size" in err and err.count("\n") == 1 and cpu < 1


@pytest.mark.parametrize("name", presets())
def test_config_file_needs_no_jax(name):
    assert loaded_by(f"from inl_jax import load_config; load_config({name!r})") == set()


def test_import_inl_jax_loads_nothing_heavy():
    assert loaded_by("import inl_jax; dir(inl_jax); inl_jax.ModelConfig") == set()
    assert "jax" in loaded_by("import inl_jax; inl_jax.generate")


def test_every_public_name_is_there_and_a_wrong_one_is_an_attribute_error():
    assert set(inl_jax.__all__) <= set(dir(inl_jax))
    for name in inl_jax.__all__:
        assert getattr(inl_jax, name) is not None
    assert callable(inl_jax.interop.params_from_torch)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        inl_jax.trian  # noqa: B018


FULL = "error: the result cannot be written to stdout (No space left on device)\n"


@pytest.mark.parametrize("argv", [["--version"], ["generate", "--help"], ["train", "--help"]])
def test_result_that_cannot_be_written_is_one_line_and_exit_code_1(inl, argv, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("inl_jax.console.sys.stdout.write", fail)
    assert inl(*argv) == (1, "", FULL)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("std::bad_alloc")])
@pytest.mark.parametrize("verb, first", [("verify", "verify.main"), ("train", "train.run")])
def test_verb_without_memory_is_one_line_and_exit_code_12(inl, monkeypatch, verb, first, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(f"inl_jax.cli.{first}", fail)
    code, out, err = inl(verb, "--config", "tiny")
    assert code == 12 and (out + err).count("\n") == 1 and "error: out of memory: " in err


def test_lost_output_ends_quietly_in_a_process_of_its_own():
    """Python itself would flush once more, complain and exit with 120."""
    for redirected, expected in (("> /dev/full", (1, FULL)), ("| true", (0, ""))):
        command = f"set -o pipefail; {sys.executable} -m inl_jax --help {redirected}"
        code, _, err, _ = run("bash", "-c", command)
        assert (code, err) == expected, redirected
