"""Text and tokens of a run as a frozen dataclass."""

import dataclasses
from typing import Literal

from inl_jax.checks import check_types, require, require_not_negative, require_positive
from inl_jax.files import check_path
from inl_jax.phase import Phase, check_phases


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text, how it becomes tokens, and how tokens become sequences."""

    paths: tuple[str, ...] = ("stdlib",)
    """Sources, each one of: a file of text, of rows (jsonl, json, csv, parquet, arrow) or of either
    packed, a directory, a glob, hf:owner/name or hf:path (a Hugging Face dataset of the hub or the
    disk; hf:owner/name@CONFIG#REVISION names a part and a commit, branch or tag, and a run keeps
    the commit that it began with), stdlib (the library of the running Python)."""
    weights: tuple[float, ...] = ()
    """Share of each source in the training batches, one weight per path; they need not sum to 1.
    Empty: all paths are one corpus."""
    phases: tuple[Phase, ...] = ()
    """Curriculum: one phase after another, each SHARE:WEIGHT,WEIGHT,... with a share of the run (or
    a number of tokens, above 1) and a weight per path, as in 0.5:1,0 0.5:1,1. SHARE@SEQ_LEN gives a
    phase shorter sequences. The last phase lasts to the end of the run. Empty: no phases."""
    column: str = ""
    """Text column of rows. Empty: content, text, code, data or prompt + completion, whichever holds
    text in most of the first rows. Rows without text, or with half of it, are counted and left
    out."""
    hf_split: str = "train"
    """Split to read of a Hugging Face dataset, and of a directory whose files or folders are named
    after splits. all: every split."""
    max_documents: int = 0
    """Documents to read from each path, from its beginning; 0 reads all."""
    tokenizer: str = "gpt2"
    """bytes, bpe:<vocabulary size> (trained on the paths), gpt2, a tokenizer.json, or the id of a
    Hugging Face repository: owner/name, or owner/name#REVISION."""
    seq_len: int = 256
    """Tokens per training sequence, S."""
    validation_fraction: float = 0.01
    """Share of the documents held out for validation; of the bytes, if there is one text file."""
    bad_utf8: Literal["replace", "error"] = "replace"
    """replace: bytes that are not UTF-8 become U+FFFD and are counted. error: they end the run."""
    cache_dir: str = "~/.cache/inl_jax"
    """Directory where prepared tokens are kept; runs may share it."""

    def __post_init__(self):
        check_types(self, "data.")
        require(len(self.paths) > 0, "data.paths is empty: name a file, a directory or stdlib")
        require(
            len(self.weights) in (0, len(self.paths)),
            f"data.weights has {len(self.weights)} values for {len(self.paths)} data.paths: "
            "give one weight per path, or none",
        )
        require(
            all(0 < weight < float("inf") for weight in self.weights),
            f"data.weights={self.weights}: every weight must be positive and finite",
        )
        require_positive(self, "data.", "seq_len")
        check_phases(
            self.phases,
            num_paths=len(self.paths),
            weights=self.weights,
            seq_len=self.seq_len,
        )
        require_not_negative(self, "data.", "max_documents")
        if self.cache_dir:
            check_path(self.cache_dir, "data.cache_dir")
        require(
            0 <= self.validation_fraction <= 1,
            f"data.validation_fraction={self.validation_fraction}: must lie between 0 and 1",
        )
