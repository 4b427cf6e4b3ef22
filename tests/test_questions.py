import inspect
import os
import pty
import select
import shlex
import subprocess
import sys

import pytest
from inl_process import ROOT, run

import inl_jax
from inl_jax import guide, questions
from inl_jax.config_file import load_config

DOOR = ROOT / "train_inl_llm_large.py"


@pytest.fixture
def ask(monkeypatch, tmp_path, capsys):
    """Runs the script on a terminal with these answers; returns (exit code, stdout, trained)."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)

    def ask(*answers, argv=()):
        left, trained = list(answers), []

        def answer(prompt):
            print(prompt)
            if not left:
                raise EOFError
            return left.pop(0)

        monkeypatch.setattr("builtins.input", answer)
        monkeypatch.setattr(questions.train, "main", lambda words: trained.append(words) or 0)
        try:
            code = questions.run([str(word) for word in argv])
        except SystemExit as stop:
            code = stop.code
        assert not left
        return code, capsys.readouterr().out, trained

    return ask


def test_questions_are_the_four_of_the_guide_with_the_defaults_of_its_function():
    defaults = inspect.signature(inl_jax.train_inl_llm).parameters
    assert {q.flag: q.default for q in questions.QUESTIONS} == {
        "size": defaults["model_size"].default,
        "data": "",
        "epochs": str(defaults["num_epochs"].default),
        "batch_size": str(defaults["batch_size"].default),
    }


def test_question_is_asked_again_after_a_wrong_answer_and_trains_the_same_run(
    ask, text_file, monkeypatch
):
    monkeypatch.setattr(questions, "show_checklist", lambda config, **_: None)
    answers = ["huge", "tiny", "", "nowhere", str(text_file), "nan", "2", "1.5", "4", ""]
    code, out, ((*words,),) = ask(*answers)
    assert code == 0 and f"the same run: {shlex.join(['inl', 'train', *words])}\n" in out
    for line in (
        "  size huge: choose one of 3b, 3b_16gb, ",
        "  data.paths: an entry is ''; ",
        "  data.paths: no such file or directory: nowhere; ",
        "  epochs nan: must be a positive number\n",
        "  batch_size 1.5: must be a positive whole number\n",
        "\n  3b       1,698,414,592 parameters (1.70B)  34.6 GiB\n",
        "\ntime: ",
    ):
        assert line in out
    asked = []
    monkeypatch.setattr(guide, "train", lambda config: asked.append(config) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        inl_jax.train_inl_llm(text_file, "tiny", 2, 4, 5e-3, save_dir="runs/inl_tiny")
    assert load_config("tiny", words[2:]) == asked[0] and asked[0].optim.warmup_steps > 0


def test_checklist_is_shown_and_no_starts_nothing(ask, text_file):
    flags = ["--size", "tiny", "--data", text_file, "--epochs", ".5"]
    code, out, trained = ask("8", "n", argv=flags)
    assert (code, trained) == (0, []) and "\nok           memory of each device " in out


def test_failed_check_ends_before_the_data_is_read(ask, text_file, monkeypatch):
    flags = ["--size", "4b", "--data", text_file, "--epochs", 1]
    monkeypatch.setattr("inl_jax.data.corpus.prepare", lambda data: 1 / 0)
    code, out, trained = ask("1000000", argv=flags)
    assert (code, trained) == (2, []) and "\nfailed       memory of each device " in out


def test_end_of_the_input_starts_nothing(ask, text_file, monkeypatch):
    monkeypatch.setattr(questions, "show_checklist", lambda config, **_: None)
    for answers in (["tiny"], ["tiny", str(text_file), "1", "8"]):
        code, _, trained = ask(*answers)
        assert (code, trained) == (2, [])


def test_flags_answer_every_question_without_a_terminal(ask, text_file, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    flags = ["--size", "tiny", "--data", text_file, "--epochs", ".5", "--batch_size", "4"]
    code, out, ((*words,),) = ask(argv=[*flags, "--learning_rate", "1e-4", "--save-dir", "here"])
    config = load_config("tiny", words[2:])
    assert (config.optim.learning_rate, config.run_dir) == (1e-4, "here") and "memory" not in out


def test_script_off_a_terminal_shows_the_whole_command():
    code, out, err, cpu = run(sys.executable, DOOR, stdin=subprocess.DEVNULL)
    assert code == 2 and out == "" and err.count("\n") == 1 and cpu < 1
    assert err.endswith(f"write {questions.EXAMPLE}\n") and "--size, --data, --epochs" in err
    assert all(f"--{question.flag} " in questions.EXAMPLE for question in questions.QUESTIONS)


def read_until(text, terminal):
    seen = ""
    while text not in seen:
        assert select.select([terminal], [], [], 120)[0], seen
        seen += os.read(terminal, 1000).decode(errors="replace")


@pytest.mark.slow
def test_script_asks_and_trains_on_a_terminal(text_file, tmp_path):
    ours, theirs = pty.openpty()
    env = os.environ | {"JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)}
    script = subprocess.Popen(
        [sys.executable, DOOR], stdin=theirs, stdout=theirs, stderr=theirs, env=env, cwd=tmp_path
    )
    os.close(theirs)
    answers = [("Size", "tiny"), ("Text", text_file), ("Epochs", 0.3), ("Batch", 4), ("Start", "")]
    for question, answer in answers:
        read_until(question, ours)
        os.write(ours, f"{answer}\n".encode())
    read_until("complete: update", ours)
    assert script.wait(60) == 0 and (tmp_path / "runs/inl_tiny/metrics.jsonl").exists()
