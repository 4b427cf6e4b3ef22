"""How many tokens per second can the input pipeline give, and how long would a GPU wait for them?

python benchmarks/input.py [--config 3b] [--rate 20000] [--batches 200] [--json]

Reads batches of a config's shape as the training loop does, from the tokens of Python's standard
library: as fast as it can; and by a loop that takes as long for each batch as GPUs would that
train at a given rate. The threads that read have the same CPU cores as the loop.
"""

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from harness import Report, config_and_flags, main, number
from tokens import write_text

from inl_jax.data.batches import training_batches, training_samples
from inl_jax.data.corpus import prepare
from inl_jax.terminal.command_line import Parser
from inl_jax.training.reader import Reader

GPUS = (1, 8, 64)


def input(parser: Parser, argv: Sequence[str]) -> Report:
    number(parser, "--rate", 20_000, "tokens/s of one GPU")
    number(parser, "--batches", 200, "batches to read as fast as possible")
    config, flags = config_and_flags(parser, argv)
    with tempfile.TemporaryDirectory() as directory:
        text = write_text(Path(directory) / "text", 10**7)
        data = dataclasses.replace(
            config.data, paths=(str(text),), tokenizer="bytes", cache_dir=f"{directory}/cache"
        )
        samples = training_samples(prepare(data), data, seed=0)
        tokens = config.batch_size * config.data.seq_len

        def reader(num_batches: int) -> Reader:
            rows = slice(0, config.batch_size)
            return Reader(
                training_batches(
                    samples,
                    position=0,
                    batch_size=config.batch_size,
                    rows=rows,
                    num_batches=num_batches,
                )
            )

        most = tokens * flags.batches / waited(reader(flags.batches), flags.batches, 0.0)[0]
        rows = []
        for gpus in GPUS:
            rate = gpus * flags.rate
            number_of = max(3, min(flags.batches, int(10 * rate / tokens)))
            seconds, wait = waited(reader(number_of), number_of, tokens / rate)
            rows.append({"gpus": gpus, "tokens_per_second": rate, "share_waited": wait / seconds})
    record = {"most_tokens_per_second": most}
    notes = [
        f"batches of {config.batch_size} x {config.data.seq_len} tokens; at most "
        f"{most:,.0f} tokens/s, enough for {most / flags.rate:,.0f} GPUs on this host",
    ]
    return Report(record, rows, notes)


def waited(reader: Reader, num_batches: int, step_seconds: float) -> tuple[float, float]:
    """Seconds of a loop of steps that begins with its second batch, and those it waited."""
    reader.next(60)
    begun, wait = time.perf_counter(), 0.0
    for _ in range(num_batches - 1):
        time.sleep(step_seconds)
        asked = time.perf_counter()
        reader.next(60)
        wait += time.perf_counter() - asked
    return time.perf_counter() - begun, wait


if __name__ == "__main__":
    main(input)
