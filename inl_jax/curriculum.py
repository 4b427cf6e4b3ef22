"""The phases of a run: where each ends, what a resumed run has read, and what is said of them."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from inl_jax.checks import require
from inl_jax.config import DataConfig, Phase, TrainConfig
from inl_jax.console import plural, say
from inl_jax.data.batches import count_windows
from inl_jax.data.cache import digest
from inl_jax.data.corpus import Corpus
from inl_jax.data.phases import Curriculum, Span

ENDLESS = 2**62
"""The end of the last phase, in samples."""

WHOLE_RUN = Phase(share=1, weights=(1,))
"""The one phase of a run without `data.phases`."""

Read = Sequence[tuple[int, str, int]]
"""What a run has read, as a checkpoint holds it: the number of a phase, its text, its end."""


def make_curriculum(
    config: TrainConfig, num_steps: int, *, step: int = 0, position: int = 0, read: Read = ()
) -> Curriculum:
    """The phases of a run that starts or resumes; one endless phase if `data.phases` is empty.

    A phase ends at the update that is nearest to its share of `num_steps`, the shares before it
    included, or after its tokens. What is read stays as it was read: phases that are over keep
    their ends, and if the current one draws otherwise now, it does so from `position` on.

    Args:
      config: the run, as it shall continue.
      num_steps: its updates in all.
      step: updates done.
      position: samples consumed by them.
      read: the phases of these samples, from `read_so_far`.

    Raises:
      InputError: a phase that is over has changed.
    """
    data, batch_size = config.data, config.batch_size
    phases = data.phases or (WHOLE_RUN,)
    spans: list[Span] = []
    for number, text, end in read:
        spans.append(Span(number, Phase.parse(text), spans[-1].end if spans else 0, end))
    current = spans[-1].number if spans else 0
    require(
        current < len(phases),
        f"data.phases has {plural(len(phases), 'phase')}, but {config.run_dir} is in phase "
        f"{current + 1}: name those that are over, too",
    )

    def end_of(number: int, begin: int, tokens: int = 0) -> int:
        """The sample at which a phase ends that has `tokens` behind it at sample `begin`."""
        phase = phases[number]
        if phase.share > 1:  # in whole numbers, so that every start rounds alike
            per_update = batch_size * _length(phase, data)
            updates = (round(phase.share) - tokens + per_update // 2) // per_update
            return begin + updates * batch_size
        share = sum(phase.share for phase in phases[: number + 1])
        return position + (round(share * num_steps) - step) * batch_size

    for number, phase in enumerate(phases):  # `past` is what is read of it
        past = [span for span in spans if span.number == number]
        alike = bool(past) and _draws(past[-1].phase, data) == _draws(phase, data)
        begin = spans[-1].end if spans else 0
        tokens = sum((span.end - span.begin) * _length(span.phase, data) for span in past)
        end = ENDLESS if number == len(phases) - 1 else max(begin, end_of(number, begin, tokens))
        if past and (number < current or end == begin):  # over
            was = past[-1]
            ends_alike = (
                number == current
                or phase.share == was.phase.share
                or end_of(number, past[0].begin) == was.end
            )
            require(
                alike and ends_alike,
                f"data.phases: phase {number + 1} is {phase}, but it is over in {config.run_dir} "
                f"and was {was.phase}: write it so, or start another run_dir with init_from",
            )
            spans[spans.index(was)] = was._replace(phase=phase)  # perhaps another share now
        elif alike:
            spans[-1] = Span(number, phase, past[-1].begin, end)
        elif number >= current:
            spans.append(Span(number, phase, begin, end))
    return Curriculum(spans, seq_len=data.seq_len, num_sources=len(data.paths))


def lengths_ahead(curriculum: Curriculum, begin: int, end: int) -> list[int]:
    """The lengths of the sequences from sample `begin` to `end - 1`, each once, in order."""
    found = [
        curriculum.seq_len_of(max(span.begin, begin))
        for span in curriculum.spans
        if max(span.begin, begin) < min(span.end, end)
    ]
    return list(dict.fromkeys(found))


def beginnings(
    curriculum: Curriculum, config: TrainConfig, step: int, position: int
) -> dict[int, str]:
    """What to say before the updates that begin a phase, for a run at `step` and `position`."""
    spans = [span for span in curriculum.spans if position <= span.begin < span.end]
    number = len(config.data.phases)
    return {
        step + 1 + (span.begin - position) // config.batch_size: (
            f"phase {span.number + 1} of {number} ({span.phase}) begins"
        )
        for span in spans
        if number
    }


def note_read(curriculum: Curriculum, position: int) -> Read:
    """What a checkpoint after `position` samples holds, for `read_so_far`; without phases, ()."""
    return [
        (span.number, str(span.phase), min(span.end, position))
        for span in curriculum.spans
        if span.begin < min(span.end, position) and span.phase is not WHOLE_RUN
    ]


def read_so_far(saved: dict[str, Any], config: TrainConfig, corpus: Corpus) -> Read:
    """What a run that resumes has read in phases. Says so if its sources changed.

    A run without phases that read one source counts as one phase of it.

    Args:
      saved: the position in its checkpoint.
      config: the run, as it shall continue.
      corpus: its data.

    Raises:
      InputError: phases were added or taken away, and where each source was cannot be known.
    """
    data, read = config.data, saved.get("phases", [])
    afresh = "or start another run_dir with init_from"
    if not data.phases:
        require(
            not read,
            f"data.phases is empty, but {config.run_dir} has phases: name them, {afresh}",
        )
        return []
    require(
        saved["seq_len"] == data.seq_len,
        f"data.seq_len={data.seq_len}, but {config.run_dir} has data.seq_len={saved['seq_len']}, "
        f"which stays with data.phases: set it so, {afresh}; a phase may have a shorter one",
    )
    sources = [files.fingerprint for files in corpus.sources]
    if not read:
        require(
            digest(sources[0]) == saved["data"],
            f"data.phases: {config.run_dir} was trained without phases, and not on "
            f"{data.paths[0]}, the first of data.paths, alone: put what it was trained on first, "
            f"{afresh}",
        )
        read = [(0, str(WHOLE_RUN), saved["samples_seen"])]
    known = len(Phase.parse(read[-1][1]).weights)
    require(
        known <= len(sources),
        f"data.paths has {plural(len(sources), 'path')}, but {config.run_dir} was trained on "
        f"{known}: keep them, with weight 0 if they are not wanted",
    )
    if digest(*sources[:known]) != saved["data"]:
        say(
            "the training data changed since: each of data.paths is read on where the run was in "
            "the path of its place, so new data is entered in its middle; to read it from its "
            "beginning, name it last in data.paths, and give it a weight in a phase"
        )
    return read


def resumed_position(saved: dict[str, Any], config: TrainConfig, corpus: Corpus) -> int:
    """Samples consumed so far, counted in windows of this run. Says what changed in the data."""
    data, position = config.data, saved["samples_seen"]
    if saved["seq_len"] != data.seq_len:
        say(
            f"data.seq_len was {saved['seq_len']}: the new windows start after the same number of "
            "tokens, in an order of their own"
        )
        position = position * saved["seq_len"] // data.seq_len
    if saved["data"] != corpus.fingerprint and not data.phases:
        windows = sum(count_windows(files, data.seq_len) for files in corpus.sources)
        epoch, sample = divmod(position, windows)
        say(
            "the training data changed since: the new corpus is entered in its middle, at sample "
            f"{sample:,} of {windows:,} in epoch {epoch + 1}. To read it from its beginning, start "
            f"another run_dir with init_from={config.run_dir}; or name the old path first in "
            "data.paths, and give the new one a phase (docs/curriculum.md)"
        )
    return position


def describe(
    curriculum: Curriculum,
    config: TrainConfig,
    num_steps: int,
    step: int = 0,
    position: int = 0,
    windows: Sequence[int] = (),
) -> Iterator[str]:
    """Yields a line for each phase, if any, and a warning if a source is read more than once.

    Args:
      curriculum: from `make_curriculum`.
      config: the run.
      num_steps: its updates in all.
      step: updates done.
      position: samples consumed by them.
      windows: of each source; no epochs are given if they are not known.
    """
    if not config.data.phases:
        return
    data, last = config.data, position + (num_steps - step) * config.batch_size
    epoch = np.array(windows or [np.inf] * len(data.paths)) * data.seq_len
    for span in curriculum.spans:
        head = f"phase {span.number + 1} of {len(data.phases)} ({span.phase}): "
        begin, end = max(span.begin, position), min(span.end, last)
        if span.begin < span.end <= position:
            yield f"{head}over, {span.end - span.begin:,} sequences"
        elif begin >= end:
            yield f"{head}no updates"
        else:
            first, final = (step + (at - position) // config.batch_size for at in (begin, end))
            weights = np.array(span.phase.weights)
            before, after = curriculum.tokens_read(span.begin), curriculum.tokens_read(end)
            sources = [
                f"{path} {100 * share:.3g}%" + (f" ({n:.2f} epochs)" if windows else "")
                for path, share, n in zip(
                    data.paths, weights / weights.sum(), (after - before) / epoch, strict=True
                )
                if share > 0
            ]
            yield (
                f"{head}updates {first + 1:,} to {final:,} in sequences of "
                f"{_length(span.phase, data)}: {', '.join(sources)}"
            )
    times = curriculum.tokens_read(last) / epoch
    repeated = [f"{path} {n:.2f} times" for path, n in zip(data.paths, times, strict=True) if n > 1]
    if repeated:
        yield f"WARNING: read more than once in this run: {', '.join(repeated)}"


def _draws(phase: Phase, data: DataConfig) -> tuple[float, ...]:
    """What decides the samples of a phase: its length, and the weights of all paths."""
    missing = len(data.paths) - len(phase.weights)
    return (_length(phase, data), *phase.weights, *[0.0] * missing)


def _length(phase: Phase, data: DataConfig) -> int:
    return phase.seq_len or data.seq_len
