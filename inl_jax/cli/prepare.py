"""Turns the text of a config into cached tokens, before training does, and says where they are.

inl prepare --config tiny --data.paths a.txt b/ --data.tokenizer bytes
"""

from collections.abc import Sequence

from inl_jax.console import say
from inl_jax.terminal import signals
from inl_jax.terminal.command_line import Parser, from_command_line

# The fields that most people need.
FIRST = """data.paths data.weights data.column data.hf_split data.max_documents data.tokenizer
data.validation_fraction data.bad_utf8 data.cache_dir""".split()


def main(argv: Sequence[str]) -> int:
    """The verb; returns the exit code."""
    parser = Parser("prepare", __doc__, add_help=False)
    config, _ = from_command_line(parser, argv, first=FIRST)
    from inl_jax.data.corpus import prepare

    signals.unwind()
    corpus = prepare(config.data)
    name, vocab_size = corpus.tokenizer.name, corpus.tokenizer.vocab_size
    say(f"tokenizer {name}: {vocab_size:,} ids, end token {corpus.tokenizer.end_id}")
    for source, weight in zip(corpus.sources, corpus.weights, strict=True):
        say(
            f"{source.directory}: {source.documents:,} documents, weight {weight:g}, {source.dtype}"
        )
        say(f"  train      {source.train_tokens:>15,} tokens {source.train_bytes:>16,} bytes")
        say(
            f"  validation {source.validation_tokens:>15,} tokens "
            f"{source.validation_bytes:>16,} bytes"
        )
    say(f"data fingerprint {corpus.fingerprint}")
    return 0
