"""Tokenises the text of a config once, ahead of training, and says where the tokens are.

python scripts/prepare_data.py --config configs/tiny.py --data.paths a.txt b/ --data.tokenizer bytes
"""

import argparse

from inl_jax.cli.command_line import exit_on_input_error, from_command_line
from inl_jax.data.corpus import prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, add_help=False)
    config, _ = from_command_line(parser)
    with exit_on_input_error():
        corpus = prepare(config.data)
    name, vocab_size = corpus.tokenizer.name, corpus.tokenizer.vocab_size
    print(f"tokenizer {name}: {vocab_size:,} ids, end token {corpus.tokenizer.end_id}")
    for source, weight in zip(corpus.sources, corpus.weights, strict=True):
        print(
            f"{source.directory}: {source.documents:,} documents, weight {weight:g}, {source.dtype}"
        )
        print(f"  train      {source.train_tokens:>15,} tokens {source.train_bytes:>16,} bytes")
        print(
            f"  validation {source.validation_tokens:>15,} tokens "
            f"{source.validation_bytes:>16,} bytes"
        )
    print(f"data fingerprint {corpus.fingerprint}")


if __name__ == "__main__":
    main()
