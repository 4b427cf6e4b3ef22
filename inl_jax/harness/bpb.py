"""The task `bpb`: bits per byte on a run's own validation text, document by document."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from inl_jax.config import InputError
from inl_jax.data.corpus import Corpus, prepare
from inl_jax.storage.run_dir import read_config, read_tokenizer, warn_without_records


def documents(checkpoint: str = "", **others: Any) -> dict[str, Any]:
    """The task's data, for lm_eval, which passes on `--model_args` and `--metadata`.

    Args:
      checkpoint: the run whose validation text it is.
      others: whatever else is passed.

    Raises:
      InputError: no run is named, or it has no validation text.
    """
    if not checkpoint:
        raise InputError(
            'task bpb: has the text of a run; name it by --metadata \'{"checkpoint": "RUN"}\''
        )
    data = read_config(checkpoint).data
    corpus = prepare(data, tokenizer=read_tokenizer(checkpoint))
    texts = list(validation_texts(corpus))
    if not texts:
        raise InputError(
            f"task bpb: {checkpoint} has no validation text; raise data.validation_fraction before "
            "training"
        )
    warn_without_records(checkpoint, "the text of task bpb")
    import datasets

    return {"validation": datasets.Dataset.from_dict({"text": texts})}


def validation_texts(corpus: Corpus) -> Iterator[str]:
    """The documents of the validation split, from their tokens."""
    for files in corpus.sources:
        tokens = files.open("validation")[:]
        ends = np.flatnonzero(tokens == corpus.tokenizer.end_id)
        for part in np.split(tokens, ends):
            if text := corpus.tokenizer.decode(part):  # leaves out the end token before it
                yield text
