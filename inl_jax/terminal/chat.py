"""`inl generate --interactive`: lines of a person, continued by a model."""

import contextlib
import dataclasses
import signal
import sys
from typing import Any

from inl_jax.checks import InputError
from inl_jax.console import complain, show
from inl_jax.sampling import LanguageModel, Sampling
from inl_jax.sampling.continuation import Continuation
from inl_jax.sampling.conversation import Conversation
from inl_jax.training.stop import Stopped

HELP = """\
The model continues text: it was trained on documents, not on conversations. Your line and a line
break are added to the history, and the model continues the history.

an empty line        the model goes on from where it stopped
/reset               forgets the history
/undo                takes back the last line and its answer
/set                 shows the settings; /set temperature 0.5 changes one
/help                shows this
Ctrl-C               stops the answer; what is shown of it stays in the history
Ctrl-D               ends the program"""
EMPTY = {
    "end": "(nothing: the model ended the text at once; --ignore_end goes past its end token)",
    "stop": "(nothing: a stop string came at once)",
    "length": "(nothing: the tokens made no whole character)",
}


class Chat:
    """Reads lines from stdin until it ends; answers go to stdout, remarks to stderr."""

    def __init__(self, model: LanguageModel, prompt: str, settings: dict[str, Any]):
        """Begins the history with a prompt; takes the settings of `Conversation.answer`."""
        self._conversation, self._settings = Conversation(model), settings
        if prompt:
            self._conversation.say(prompt)
        self._said_beyond = False
        self._settable = ["max_new_tokens", "seed"]
        self._settable += [field.name for field in dataclasses.fields(Sampling)]

    def run(self) -> None:
        """Holds the conversation."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (`input` then edits lines and recalls them)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        complain("the model continues your lines; /help says how, Ctrl-D ends")
        on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        has_reader = True
        while has_reader:
            try:
                has_reader = self._turn(input("> " if on_terminal else ""))
            except EOFError:
                return
            except KeyboardInterrupt as stopped:
                if isinstance(stopped, Stopped):
                    raise
                show("")  # after the ^C
            except UnicodeDecodeError:
                complain("the line is not UTF-8 and was left out")
            except InputError as error:
                complain(str(error))

    def _turn(self, line: str) -> bool:
        """Follows a command or answers a line; returns whether stdout still has a reader."""
        command, *words = line.split() if line.startswith("/") else [""]
        if command == "/help":
            complain(HELP)
        elif command == "/reset":
            self._conversation.reset()
        elif command == "/undo":
            if not self._conversation.undo():
                complain("there is nothing to take back")
        elif command == "/set":
            self._set(words)
        elif command[1:].isalpha():
            complain(f"{command}: no such command; begin with a space to feed the line as it is")
        else:
            return self._answer(line)
        return True

    def _set(self, words: list[str]) -> None:
        if len(words) == 2 and words[0] in self._settable:
            name, value = words
            kind = type(self._settings[name])
            try:
                changed = self._settings | {name: kind(value)}
            except ValueError:
                raise InputError(f"{name}={value}: must be of type {kind.__name__}") from None
            Sampling(**{f.name: changed[f.name] for f in dataclasses.fields(Sampling)})
            self._settings = changed
        elif words:
            raise InputError(f"/set {' '.join(words)}: write /set NAME VALUE, as shown by /set")
        complain("  ".join(f"{name} {self._settings[name]}" for name in self._settable))

    def _answer(self, line: str) -> bool:
        conversation = self._conversation
        joint = "\n" if conversation.text and not conversation.text.endswith("\n") else ""
        conversation.say(f"{joint}{line}\n" if line else "")
        try:
            answer = None
            with contextlib.closing(conversation.answer(**self._settings)) as growing:
                for answer in growing:
                    if not show(answer.take(), end=""):
                        return False
        except InputError:
            conversation.undo()
            raise
        if not answer.text.endswith("\n"):
            show("")
        self._remark(answer)
        return True

    def _remark(self, answer: Continuation) -> None:
        """Says why an answer is empty, and what the length of the history means."""
        length, config = self._conversation.num_tokens, self._conversation.model.config
        longest = f"model.max_seq_len={config.max_seq_len}"
        if not answer.text:
            complain(EMPTY[answer.finish_reason])
        if config.uses_attention and length >= config.max_seq_len:
            complain(f"the history fills {longest}: /undo takes back a turn, /reset forgets all")
        elif length > config.max_seq_len and not self._said_beyond:
            self._said_beyond = True
            complain(
                f"the history is longer than {longest}, and the model was not trained beyond it"
            )
