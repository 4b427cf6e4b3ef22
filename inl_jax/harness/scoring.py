"""Log-likelihoods of continuations. A context is read once, however many continuations it has.

Continuations that share a context start from copies of one decoding state: a key-value cache of
each layer of attention, one vector of each other. A context with a single continuation is read in
one pass with it. Lengths are padded to powers of two, so that few programs are compiled.

Shapes: B rows, P tokens of a context, S tokens of a row, K targets, D width.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from inl_jax.config import InputError, ModelConfig
from inl_jax.console import plural, progress_bar, say
from inl_jax.model.language_model import DecodeState, INLModel, hidden_states, init_decode_state
from inl_jax.model.layers import embedding_rows, project
from inl_jax.model.losses import Chunk, chunk_tokens
from inl_jax.model.params import current_batch_shards, join_positions, split_positions
from inl_jax.parallel.sharding import fetch, local_rows, on, place
from inl_jax.sampling import LanguageModel

_SHORTEST = 16  # tokens that every row is padded to


class Score(NamedTuple):
    """How likely a continuation is."""

    log_likelihood: float  # nats, summed over its tokens
    is_greedy: bool  # whether each token is the likeliest one


class Pair(NamedTuple):
    """Token ids of a context and its continuation, at least one in each."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Scorer:
    """Scores continuations of contexts with one model.

    Attributes:
      tokens_read: tokens that the model has read so far, without padding.
    """

    def __init__(self, model: LanguageModel, *, batch_size: int, loss_chunk: Chunk = "auto"):
        """Takes the model, the rows of a batch, and the tokens whose logits exist at once.

        `batch_size` must be a multiple of `batch_shards(model.mesh)`; `loss_chunk` is that of
        `evaluate`.
        """
        self._model, self._batch_size, self._chunk = model, batch_size, loss_chunk
        self.tokens_read = 0

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
        """The score of every (context, continuation), in their order.

        A context that is too long for the model loses its first tokens, and a line says so.

        Raises:
          InputError: a continuation is empty, or longer than `model.max_seq_len`.
        """
        fitted = [self._fit(*pair) for pair in pairs]
        cut = sum(len(a.context) < len(b[0]) for a, b in zip(fitted, pairs, strict=True))
        if cut:
            say(
                f"{cut:,} of {plural(len(pairs), 'context')} cut on the left to fit "
                f"model.max_seq_len={self._model.config.max_seq_len}"
            )
        found: list[Score | None] = [None] * len(fitted)
        with on(self._model.mesh), progress_bar(len(fitted), unit="request") as bar:
            for indices, scores in self._batches(fitted):
                for index, score in zip(indices, scores, strict=True):
                    found[index] = score
                bar.update(len(indices))
        return found

    def _fit(self, context: Sequence[int], continuation: Sequence[int]) -> Pair:
        longest = self._model.config.max_seq_len
        if not 0 < len(continuation) <= longest:
            raise InputError(
                f"a continuation of {plural(len(continuation), 'token')}: the model takes 1 to "
                f"model.max_seq_len={longest}; leave out the task"
            )
        room = longest + 1 - len(continuation)  # the last token is predicted, and not read
        return Pair(tuple(context[-room:]), tuple(continuation))

    def _batches(self, pairs: Sequence[Pair]) -> Iterator[tuple[list[int], list[Score]]]:
        """Yields the indices and scores of all pairs, batch by batch, the longest first."""
        by_context = defaultdict(list)
        for index, pair in enumerate(pairs):
            by_context[pair.context].append(index)
        single, shared = [], []
        for context, indices in by_context.items():
            # The last token of a context is read with each continuation: there must be another.
            if len(indices) > 1 and len(context) > 1:
                shared.append(indices)
            else:
                single += indices
        single.sort(key=lambda index: -sum(map(len, pairs[index])))
        for indices in _split(single, self._batch_size):
            yield indices, self._score_whole([pairs[index] for index in indices])
        shared.sort(key=lambda indices: -len(pairs[indices[0]].context))
        for groups in _split(shared, self._batch_size):
            state = self._read([[pairs[index] for index in indices] for indices in groups])
            choices = [(index, row) for row, indices in enumerate(groups) for index in indices]
            choices.sort(key=lambda choice: -len(pairs[choice[0]].continuation))
            for batch in _split(choices, self._batch_size):
                indices, rows = map(list, zip(*batch, strict=True))
                yield indices, self._score_after(state, rows, [pairs[index] for index in indices])

    def _score_whole(self, pairs: Sequence[Pair]) -> list[Score]:
        inputs = self._inputs([pair.context + pair.continuation[:-1] for pair in pairs])
        start_B = self._numbers([len(pair.context) - 1 for pair in pairs])
        return self._scores(score_whole, pairs, inputs, start_B)

    def _read(self, groups: Sequence[Sequence[Pair]]) -> DecodeState:
        """The state after each context but its last token."""
        contexts = [pairs[0].context[:-1] for pairs in groups]
        ids_BP = self._inputs(contexts)
        longest = max(len(pair.continuation) for pairs in groups for pair in pairs)
        return read(
            self._model.config,
            self._model.params,
            ids_BP,
            self._numbers(list(map(len, contexts)), fill=1),
            max_len=ids_BP.shape[1] + self._width(longest),
        )

    def _score_after(self, state: DecodeState, rows, pairs: Sequence[Pair]) -> list[Score]:
        inputs = self._inputs([pair.context[-1:] + pair.continuation[:-1] for pair in pairs])
        return self._scores(score_after, pairs, inputs, state, self._numbers(rows))

    def _scores(self, program: Callable, pairs: Sequence[Pair], *arguments) -> list[Score]:
        targets_BK = self._padded([pair.continuation for pair in pairs])
        log_likelihoods, best = map(
            fetch,
            program(
                self._model.config, self._model.params, targets_BK, *arguments, chunk=self._chunk
            ),
        )
        return [
            Score(
                float(log_likelihoods[row, : len(pair.continuation)].sum(dtype=np.float64)),
                bool(best[row, : len(pair.continuation)].all()),
            )
            for row, pair in enumerate(pairs)
        ]

    def _inputs(self, rows: Sequence[Sequence[int]]) -> jax.Array:
        self.tokens_read += sum(map(len, rows))
        return self._padded(rows)

    def _padded(self, rows: Sequence[Sequence[int]]) -> jax.Array:
        """Rows of any lengths as one array of a whole batch, zero-padded."""
        ids = np.zeros((self._batch_size, self._width(max(map(len, rows)))), np.int32)
        for row, given in zip(ids, rows, strict=False):
            row[: len(given)] = given
        return self._placed(ids)

    def _numbers(self, values: Sequence[int], *, fill: int = 0) -> jax.Array:
        """A number for each row of a whole batch."""
        return self._placed(np.array(values + [fill] * (self._batch_size - len(values)), np.int32))

    def _placed(self, array: np.ndarray) -> jax.Array:
        mesh = self._model.mesh
        if mesh is None:
            return jnp.asarray(array)
        return place(mesh, array[local_rows(mesh, len(array))])

    def _width(self, length: int) -> int:
        power = 1 << max(length - 1, _SHORTEST - 1).bit_length()
        return min(power, self._model.config.max_seq_len)


def _split(items: list, size: int) -> Iterator[list]:
    return (items[start : start + size] for start in range(0, len(items), size))


@functools.partial(jax.jit, static_argnames=("config", "chunk"))
def score_whole(config: ModelConfig, params, targets_BK, ids_BS, start_B, *, chunk: Chunk):
    """`token_scores` of targets whose first is predicted at position `start_B` of its row."""
    hidden_BSD = hidden_states(config, params, ids_BS)
    at_BK = start_B[:, None] + jnp.arange(targets_BK.shape[1])
    at_BK = jnp.minimum(at_BK, ids_BS.shape[1] - 1)  # padding may stand beyond the end
    hidden_BKD = jnp.take_along_axis(hidden_BSD, at_BK[..., None], axis=1)
    return token_scores(params, hidden_BKD, targets_BK, chunk=chunk)


@functools.partial(jax.jit, static_argnames=("config", "max_len"))
def read(config: ModelConfig, params, ids_BP, length_B, *, max_len: int) -> DecodeState:
    """The state after the first `length_B` tokens of each row, with room for `max_len`."""
    state = init_decode_state(config, len(ids_BP), max_len)
    return _apply(config, params, ids_BP, state, length_B)[1]


@functools.partial(jax.jit, static_argnames=("config", "chunk"))
def score_after(config: ModelConfig, params, targets_BK, ids_BK, state, row_B, *, chunk: Chunk):
    """`token_scores` of rows that continue from the rows `row_B` of a state."""
    layers = jax.tree.map(lambda leaf: leaf[:, row_B], state.layers)
    state = DecodeState(state.position_B[row_B], layers)
    hidden_BKD, _ = _apply(config, params, ids_BK, state, None)
    return token_scores(params, hidden_BKD, targets_BK, chunk=chunk)


def _apply(config: ModelConfig, params, ids_BS, state: DecodeState, length_B):
    amplitude = config.excitation_amplitude
    return INLModel(config).apply({"params": params}, ids_BS, state, length_B, amplitude)


def token_scores(params, hidden_BKD, targets_BK, *, chunk: Chunk) -> tuple[jax.Array, jax.Array]:
    """The log-likelihood of every target, at least float32, and whether it is likeliest, [B, K].

    `chunk` counts tokens, as in `losses.token_losses`.
    """
    embedding_VD = embedding_rows(params["embedding"])
    B, K = targets_BK.shape
    rows = B // current_batch_shards(B)  # of each device
    tokens = max(1, chunk_tokens(chunk, len(embedding_VD), rows * K) // rows)  # of each row

    def score(arrays):
        hidden_BTD, targets_BT = arrays
        logits_BTV = project(embedding_VD, hidden_BTD)
        chosen_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
        log_likelihood_BT = chosen_BT - jax.nn.logsumexp(logits_BTV, axis=-1)
        return log_likelihood_BT, jnp.argmax(logits_BTV, axis=-1) == targets_BT

    parts = jax.tree.map(lambda a: split_positions(a, tokens), (hidden_BKD, targets_BK))
    return jax.tree.map(lambda a: join_positions(a, K), jax.lax.map(score, parts))
