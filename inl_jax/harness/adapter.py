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
from inl_jax.console import progress_bar
from inl_jax.harness.scoring import Scorer
from inl_jax.model.losses import CHUNK
from inl_jax.sampling import LanguageModel, generate

MAX_NEW_TOKENS = 256  # where a task names no number, as in HFLM
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("top_k", "top_p")


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
        loss_chunk: int = CHUNK,
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
          InputError: a task asks for a setting that is not there, or for too many tokens.
        """
        by_settings = defaultdict(list)
        for index, request in enumerate(requests):
            by_settings[repr(request.args[1])].append(index)
        texts = [""] * len(requests)
        with progress_bar(len(requests), unit="request") as bar:
            for indices in by_settings.values():
                settings = requests[indices[0]].args[1]
                until, max_new_tokens, sampling = generation_settings(settings)
                if max_new_tokens >= self.max_length:
                    raise InputError(
                        f"max_gen_toks={max_new_tokens}: leaves no room for a context in "
                        f"model.max_seq_len={self.max_length}; lower it by --gen_kwargs "
                        f"max_gen_toks={max(1, self.max_length // 4)}"
                    )
                room = self.max_length - max_new_tokens
                prompts = {i: self.tok_encode(requests[i].args[0])[-room:] for i in indices}
                order = sorted(indices, key=lambda index: -len(prompts[index]))
                for start in range(0, len(order), self._batch_size):
                    batch = order[start : start + self._batch_size]
                    rows = generate(
                        self._model.config,
                        self._model.params,
                        [prompts[index] or [self.prefix_token_id] for index in batch],
                        max_new_tokens=max_new_tokens,
                        seed=start,
                        end_id=self.eot_token_id,
                        num_ids=self._model.tokenizer.vocab_size,
                        mesh=self._model.mesh,
                        **sampling,
                    )
                    for index, row in zip(batch, rows, strict=True):
                        texts[index] = cut(self._model.tokenizer.decode(row), until)
                        self.cache_hook.add_partial(
                            "generate_until", requests[index].args, texts[index]
                        )
                    bar.update(len(batch))
        return texts


def generation_settings(given: Mapping[str, Any]) -> tuple[list[str], int, dict[str, Any]]:
    """Stop strings, the most new tokens, and settings of `sampling.generate`, from a task's.

    Without `do_sample` the temperature decides whether tokens are drawn.

    Raises:
      InputError: there is no such setting.
    """
    left = dict(given)
    until = left.pop("until", None) or []
    lengths = [left.pop(name) for name in _LENGTHS if name in left]
    drawn, temperature = left.pop("do_sample", None), left.pop("temperature", None)
    if drawn is None:
        drawn = bool(temperature)
    sampling = {name: left.pop(name) for name in _SAMPLING if name in left}
    if left:
        name, value = next(iter(left.items()))
        raise InputError(
            f"{name}={value}: a setting of generation that is not there; there are until, "
            f"{_LENGTHS[0]}, do_sample, temperature, {', '.join(_SAMPLING)}"
        )
    sampling = {"temperature": 1.0 if temperature is None else float(temperature)} | sampling
    return (
        [until] if isinstance(until, str) else list(until),
        int(lengths[0]) if lengths else MAX_NEW_TOKENS,
        sampling if drawn else {},
    )


def cut(text: str, until: Sequence[str]) -> str:
    """`text` up to the first of the stop strings, without it."""
    ends = [text.find(stop) for stop in until if stop and stop in text]
    return text[: min(ends)] if ends else text
