"""A run directory as a model of lm-evaluation-harness.

To import this module, which needs lm_eval, registers the model as `inl_jax`. What decides a number
is as in HFLM, the adapter for transformers: how texts are tokenized and cut into windows, what
stands before an empty context, and where generated text ends.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from inl_jax.config import InputError
from inl_jax.console import plural, progress_bar, say
from inl_jax.harness.scoring import Scorer
from inl_jax.model.losses import Chunk
from inl_jax.sampling import LanguageModel, Sampling
from inl_jax.sampling.continuation import INCOMPLETE
from inl_jax.sampling.decoding import pieces, read_prompts
from inl_jax.sampling.text import PIECE

MAX_NEW_TOKENS = 256  # where a task names no number, as in HFLM
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")


@register_model("inl_jax")
class RunLM(TemplateLM):
    """The model of a run directory.

    Attributes:
      scorer: computes the log-likelihoods.
    """

    def __init__(
        self,
        checkpoint: str | LanguageModel,
        step: int | str = "latest",
        batch_size: int = 16,
        loss_chunk: Chunk = "auto",
    ):
        """Takes a run and a step, or the model itself; the others are as in `Scorer`."""
        super().__init__()
        if not isinstance(checkpoint, LanguageModel):
            checkpoint = LanguageModel.from_run(checkpoint, step=step)
        self._model, self._batch_size = checkpoint, int(batch_size)
        self.scorer = Scorer(checkpoint, batch_size=self._batch_size, loss_chunk=loss_chunk)

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at most."""
        return self._model.config.max_seq_len

    @property
    def eot_token_id(self) -> int:
        """The token that closes a document; it stands before an empty context."""
        return self._model.tokenizer.end_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **settings: Any
    ) -> list[int]:
        """The ids of a text; there are no special tokens to add."""
        return self._model.tokenizer.encode(string).tolist()

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **settings: Any
    ) -> list[tuple[float, bool]]:
        scores = self.scorer.score([(context, after) for _, context, after in requests])
        for (texts, _, _), score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, tuple(score))
        return [tuple(score) for score in scores]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of every text, in windows that predict each token once."""
        texts = [request.args[0] for request in requests]
        windows = [
            (index, *make_disjoint_window(window))
            for index, text in enumerate(texts)
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
        ]
        scores = self.scorer.score([(context, after) for _, context, after in windows])
        sums = [0.0] * len(texts)
        for (index, _, _), score in zip(windows, scores, strict=True):
            sums[index] += score.log_likelihood
        for text, total in zip(texts, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return sums

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation of every context, up to a stop string or the end token.

        Raises:
          InputError: as `generation_settings`.
        """
        by_settings = defaultdict(list)
        for index, request in enumerate(requests):
            by_settings[repr(request.args[1])].append(index)
        texts = [""] * len(requests)
        with progress_bar(len(requests), unit="request") as bar:
            for indices in by_settings.values():
                settings = requests[indices[0]].args[1]
                until, max_new_tokens, sampling = generation_settings(settings, self.max_length)
                room = self.max_length - max_new_tokens
                whole = {i: self.tok_encode(requests[i].args[0]) for i in indices}
                if cut_off := sum(len(ids) > room for ids in whole.values()):
                    say(
                        f"{cut_off:,} of {plural(len(indices), 'context')} cut on the left to fit "
                        f"model.max_seq_len={self.max_length} with {max_new_tokens:,} new tokens"
                    )
                prompts = {i: ids[-room:] for i, ids in whole.items()}
                order = sorted(indices, key=lambda index: -len(prompts[index]))
                for start in range(0, len(order), self._batch_size):
                    batch = order[start : start + self._batch_size]
                    found = self._continue(
                        [prompts[index] or [self.prefix_token_id] for index in batch],
                        until,
                        sampling,
                        max_new_tokens=max_new_tokens,
                        seed=start,
                    )
                    for index, text in zip(batch, found, strict=True):
                        texts[index] = text
                        self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    bar.update(len(batch))
        return texts

    def _continue(
        self,
        prompts: Sequence[Sequence[int]],
        until: Sequence[str],
        sampling: Sampling,
        *,
        max_new_tokens: int,
        seed: int,
    ) -> list[str]:
        """What the model adds to prompts of ids, until no text can change any more."""
        model = self._model
        shared = {
            "max_new_tokens": max_new_tokens,
            "num_ids": model.tokenizer.vocab_size,
            "mesh": model.mesh,
        }
        rows = read_prompts(
            model.config, model.params, prompts, sampling, num_samples=1, seed=seed, **shared
        )
        new = pieces(
            model.config,
            model.params,
            rows,
            sampling,
            size=PIECE,
            end_id=self.eot_token_id,
            **shared,
        )
        ids = [[] for _ in prompts]
        for piece in new:
            for row, tokens, length in zip(ids, piece.tokens_Bn, piece.length_B, strict=True):
                row += tokens[:length].tolist()
            # As HFLM, without the prompt: a decoder may drop the space before the first word.
            texts = list(map(model.tokenizer.decode, ids))
            ended = zip(piece.done_B, texts, strict=True)
            if all(done or is_settled(text, until) for done, text in ended):
                break
        return [cut(text, until) for text in texts]


def generation_settings(
    given: Mapping[str, Any], max_length: int
) -> tuple[list[str], int, Sampling]:
    """Stop strings, the most new tokens, and how tokens are chosen, from a task's settings.

    Without `do_sample` the temperature decides whether tokens are drawn.

    Args:
      given: the settings, by the names of lm_eval.
      max_length: `model.max_seq_len`.

    Raises:
      InputError: there is no such setting, its value is impossible, or there are too many tokens.
    """
    left = dict(given)
    until = left.pop("until", None) or []
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, list) or not all(isinstance(stop, str) for stop in until):
        raise InputError(f"until={until!r}: must be a text or a list of texts")
    lengths = {name: left.pop(name) for name in _LENGTHS if left.get(name) is not None}
    name, length = next(iter(lengths.items()), (_LENGTHS[0], MAX_NEW_TOKENS))
    if not str(length).isdecimal() or int(length) == 0:
        raise InputError(f"{name}={length}: must be a positive whole number")
    if int(length) >= max_length:
        raise InputError(
            f"{name}={length}: leaves no room for a context in model.max_seq_len={max_length}; "
            f"lower it by --gen_kwargs {_LENGTHS[0]}={max(1, max_length // 4)}"
        )
    drawn, temperature = left.pop("do_sample", None), left.pop("temperature", None)
    if drawn is None:
        drawn = bool(temperature)
    sampling = {name: left.pop(name) for name in _SAMPLING if left.get(name) is not None}
    if left:
        name, value = next(iter(left.items()))
        raise InputError(
            f"{name}={value}: a setting of generation that is not there; there are until, "
            f"{_LENGTHS[0]}, do_sample, temperature, {', '.join(_SAMPLING)}"
        )
    if drawn:
        sampling["temperature"] = 1.0 if temperature is None else temperature
    return until, int(length), Sampling(**sampling)


def cut(text: str, until: Sequence[str]) -> str:
    """`text` up to the first of the stop strings, without it."""
    ends = [text.find(stop) for stop in until if stop and stop in text]
    return text[: min(ends)] if ends else text


def is_settled(text: str, until: Sequence[str]) -> bool:
    """Whether `cut` gives the same for all longer texts: no stop string can begin earlier."""
    text = text.rstrip(INCOMPLETE)
    end = len(cut(text, until))
    return end < len(text) and end + max(map(len, until)) - 1 <= len(text)
