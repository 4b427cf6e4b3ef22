"""A text that a person and a model write in turns; what was read stays read."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from inl_jax.checks import require
from inl_jax.console import plural
from inl_jax.parallel.sharding import on
from inl_jax.sampling.choice import Sampling
from inl_jax.sampling.continuation import Continuation, encode_after, grown
from inl_jax.sampling.decoding import begin, pieces, prefill, read_more
from inl_jax.sampling.text import PIECE, LanguageModel


class Conversation:
    """The history as one growing document, with the state that the model has after reading it.

    A turn costs the reading of what is new. Without attention its memory does not grow; with
    attention the history must fit into `max_seq_len`.

    Attributes:
      model: who answers.
      text: the history: what was said and what was answered.
    """

    def __init__(self, model: LanguageModel):
        """Starts a new document."""
        self.model = model
        self.reset()

    def reset(self) -> None:
        """Forgets the history."""
        self.text = ""
        self._ids: list[int] = []
        self._turns: list[tuple[str, int]] = []  # text and number of ids before each
        self._read: Any = None  # logits and state after the first `_num_read` ids
        self._num_read = 0
        self._num_answers = 0  # also those taken back, so that a second try draws anew

    @property
    def num_tokens(self) -> int:
        """Tokens of the history."""
        return len(self._ids)

    def undo(self) -> bool:
        """Takes back the last `say` and its answer; returns whether there was one."""
        if not self._turns:
            return False
        self.text, length = self._turns.pop()
        del self._ids[length:]
        if self._num_read > length:  # a state cannot be rewound: read again at the next turn
            self._read, self._num_read = None, 0
        return True

    def say(self, text: str) -> None:
        """Begins a turn with this text, which may be empty: the history then goes on."""
        tokenizer = self.model.tokenizer
        ids = encode_after(tokenizer, text) if self.text else tokenizer.encode(text).tolist()
        self._turns.append((self.text, len(self._ids)))
        self.text += text
        self._ids += ids

    def answer(
        self,
        *,
        max_new_tokens: int,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        ignore_end: bool = False,
        **sampling: Any,
    ) -> Iterator[Continuation]:
        """Continues the history; yields the answer each time that it has grown.

        What was taken of the answer when the iterator is closed is added to the history.

        Args:
          max_new_tokens: limit of the answer; with attention, less if the context ends before.
          stop: the answer ends before the first of these strings.
          seed: decides the draw, with the number of the turn.
          ignore_end: generate past the token that ends a document.
          **sampling: the fields of `Sampling`.

        Raises:
          InputError: a setting is out of range; or the history fills the context of attention.
        """
        model, tokenizer, how = self.model, self.model.tokenizer, Sampling(**sampling)
        self._ids = self._ids or [tokenizer.end_id]  # after which a document begins
        if model.config.uses_attention:
            longest = model.config.max_seq_len
            max_new_tokens = min(max_new_tokens, longest - len(self._ids))
            require(
                max_new_tokens > 0,
                f"the history would have {plural(len(self._ids), 'token')}, and "
                f"model.max_seq_len={longest} leaves no room for an answer: undo turns, or reset",
            )
        require(
            0 < max_new_tokens < 2**31,
            f"max_new_tokens={max_new_tokens}: must be from 1 to 2**31 - 1",
        )
        with on(model.mesh, split_rows=False):
            self._read_all()
            # Copies: the loop takes over what it is given, and the answer may be cut.
            rows = begin(
                *jax.tree.map(jnp.copy, self._read),
                [self._ids],
                how,
                seed=seed,
                first_row=self._num_answers,
                num_ids=tokenizer.vocab_size,
            )
        self._num_answers += 1
        answer = Continuation(tokenizer, self.text, self._ids, limit=max_new_tokens, stop=stop)
        new = pieces(
            model.config,
            model.params,
            rows,
            how,
            size=PIECE,
            max_new_tokens=max_new_tokens,
            end_id=None if ignore_end else tokenizer.end_id,
            num_ids=tokenizer.vocab_size,
            mesh=model.mesh,
        )
        try:
            for _ in grown([answer], new):
                yield answer
        finally:
            self.text += answer.taken
            self._ids += answer.taken_ids()

    def _read_all(self) -> None:
        """Reads what is new of the history."""
        c, params = self.model.config, self.model.params
        new, read = self._ids[self._num_read :], self._read
        # Reading takes over the memory of what was read: an interruption would leave nothing.
        self._read, self._num_read = None, 0
        if read is None:
            read = prefill(c, params, np.array([new]), np.array([len(new)]), max_len=c.max_seq_len)
        else:
            read = read_more(c, params, *read, new)
        self._read, self._num_read = read, len(self._ids)
