import os
import pty
import select
import signal
import sys
import time

import pytest
from inl_process import ROOT

from inl_jax.sampling.continuation import Continuation
from inl_jax.terminal import chat as module
from inl_jax.terminal.chat import Chat
from inl_jax.tokens.tokenizer import load_tokenizer


@pytest.fixture
def chat(monkeypatch, capsys, model_config):
    """Follows lines with a model that answers with its settings; returns (stdout, stderr)."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def follow(*lines, answer=None, **config):
        class Model:
            tokenizer = load_tokenizer("bytes")

        def answering(conversation, **settings):
            said = answer(settings) if answer else f"{settings['temperature']}."
            text = Continuation(Model.tokenizer, conversation.text, [0], limit=99)
            text.add(said.encode(), [0.0] * len(said.encode()), ended=True)
            yield text
            conversation.text += said
            conversation._ids += list(said.encode())

        Model.config = model_config(**config)
        monkeypatch.setattr(module.Conversation, "answer", answering)
        left = list(lines)
        monkeypatch.setattr("builtins.input", lambda _: left.pop(0) if left else _end())
        settings = {"temperature": 0.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        settings |= {"repetition_penalty": 1.0, "max_new_tokens": 9, "seed": 0, "stop": []}
        talk = Chat(Model, "start", settings)
        talk.run()
        return talk, *capsys.readouterr()

    return follow


def _end():
    raise EOFError


def test_chat_appends_each_line_and_its_answer_to_the_history(chat):
    talk, out, _ = chat("one", "", " /help")
    assert out == "0.5.\n" * 3
    assert talk._conversation.text == "start\none\n0.5.0.5.\n /help\n0.5."


def test_chat_follows_its_commands(chat):
    talk, out, err = chat("/set temperature 0.25", "one", "/undo", "/set", "/help", "/usr/bin")
    assert out == "0.25.\n" * 2 and talk._conversation.text == "start\n/usr/bin\n0.25."
    assert "temperature 0.25  " in err and "the model continues the history" in err
    talk, _, err = chat("/reset", "/undo")
    assert talk._conversation.text == "" and "nothing to take back" in err


@pytest.mark.parametrize(
    "line, named",
    [
        ("/set temperature warm", "temperature=warm: must be of type float"),
        ("/set top_p 2", "top_p=2.0: must be above 0"),
        ("/set colour red", "write /set NAME VALUE"),
        ("/forget", "/forget: no such command"),
    ],
)
def test_chat_answers_a_mistake_in_one_line_and_stays(chat, line, named):
    talk, out, err = chat(line, "one")
    assert named in err and out == "0.5.\n", "the settings are as they were"


def test_chat_says_what_an_empty_answer_and_a_long_history_mean(chat):
    _, out, err = chat("one", answer=lambda _: "")
    assert out == "\n" and "the model ended the text at once" in err
    _, _, err = chat("a" * 40, "b", context="decay")
    assert err.count("was not trained beyond it") == 1
    for fields in ({"context": "attention"}, {"attention_every": 2}):
        _, _, err = chat("a" * 40, **fields)
        assert "the history fills model.max_seq_len=32: /undo" in err


@pytest.mark.slow
def test_chat_on_a_terminal_survives_ctrl_c_and_ends_with_ctrl_d(trained):
    command = [sys.executable, "-m", "inl_jax", "generate", str(trained[1]), "--interactive"]
    command += ["--max_new_tokens", "100000", "--ignore_end"]
    process, terminal = pty.fork()
    if process == 0:
        os.execve(
            sys.executable,
            command,
            os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        )
    seen = b""

    def until(condition):
        """Reads until what came since the last call fulfils the condition."""
        nonlocal seen
        seen, ends = b"", time.monotonic() + 200
        while not condition(seen):
            assert time.monotonic() < ends, seen
            if select.select([terminal], [], [], 1)[0]:
                seen += os.read(terminal, 4096)
        assert b"Traceback" not in seen

    until(lambda seen: seen.endswith(b"> "))
    os.write(terminal, b"the quick\n")
    until(lambda seen: len(seen) > 60)
    os.write(terminal, b"\x03")
    until(lambda seen: seen.endswith(b"\n> "))
    os.write(terminal, b"/set max_new_tokens 3\n")
    until(lambda seen: b"max_new_tokens 3 " in seen and seen.endswith(b"> "))
    os.write(terminal, b"fox\n")
    until(lambda seen: b"fox" in seen and seen.endswith(b"\n> "))
    os.write(terminal, b"\x04")
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
