"""What happens to the loss beyond the longest sequence of training?

inl train --config tiny --model.max_seq_len 256 --data.seq_len 256 --run_dir runs/long
python benchmarks/long_context.py runs/long [RUN ...] [--times 8] [--sequences 32] [--json]

Reads held-out text in sequences of several times `max_seq_len`. A row is a range of positions: bits
per byte of the tokens there, beside those of the same tokens when the model starts afresh at every
multiple of `max_seq_len`, as in `inl evaluate`. No token reads a later one, so the positions up to
any length are those of shorter sequences.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import numpy as np
from harness import Report, flags_only, main, number

from inl_jax.config import ModelConfig
from inl_jax.data.batches import eval_batches
from inl_jax.data.corpus import prepare
from inl_jax.model.language_model import hidden_states
from inl_jax.model.losses import token_losses
from inl_jax.sampling import LanguageModel
from inl_jax.storage.run_dir import read_config
from inl_jax.terminal.command_line import Parser


def long_context(parser: Parser, argv: Sequence[str]) -> Report:
    parser.add_path("runs", metavar="RUN", nargs="+", help="run directories")
    parser.add_argument("--sequences", type=int, help="how many to read; all by default")
    number(parser, "--times", 8, "length of a sequence, in max_seq_len of the model")
    number(parser, "--batch_size", 4, "sequences at a time")
    flags = flags_only(parser, argv)
    rows = []
    for run in flags.runs:
        rows += [{"run": run.name} | row for row in by_position(run, flags)]
    return Report({}, rows, [])


def by_position(run, flags) -> list[dict[str, float | str]]:
    """The rows of one run."""
    model = LanguageModel.from_run(run)
    W = model.config.max_seq_len
    windows = eval_batches(
        prepare(read_config(run).data, tokenizer=model.tokenizer),
        seq_len=flags.times * W,
        batch_size=flags.batch_size,
        max_sequences=flags.sequences or 0,
    )
    nats_S, afresh_S, tokens_S, num_bytes = 0.0, 0.0, 0.0, 0.0
    for batch in windows:
        arrays = batch.inputs, batch.targets
        parts = [a.reshape(-1, W) for a in arrays]
        whole_BS = losses(model.config, model.params, *arrays)
        afresh_BS = losses(model.config, model.params, *parts).reshape(whole_BS.shape)
        nats_S = nats_S + (whole_BS * batch.weights).sum(axis=0, dtype=np.float64)
        afresh_S = afresh_S + (afresh_BS * batch.weights).sum(axis=0, dtype=np.float64)
        tokens_S = tokens_S + batch.weights.sum(axis=0)
        num_bytes += batch.num_bytes.sum()
    bits = tokens_S.sum() / num_bytes / math.log(2)  # per nat and token
    return [
        {
            "positions": f"{start:,} to {end - 1:,}",
            "tokens": int(tokens_S[start:end].sum()),
            "bits_per_byte": bits * nats_S[start:end].sum() / tokens_S[start:end].sum(),
            "started_afresh": bits * afresh_S[start:end].sum() / tokens_S[start:end].sum(),
        }
        for start, end in itertools.pairwise(edges(W, flags.times))
    ]


def losses(config: ModelConfig, params, inputs_BS, targets_BS) -> np.ndarray:
    """The loss of every target, in nats, [B, S]."""
    return np.asarray(_losses(config, params, inputs_BS, targets_BS))


@functools.partial(jax.jit, static_argnums=0)
def _losses(config: ModelConfig, params, inputs_BS, targets_BS) -> jax.Array:
    return token_losses(params, hidden_states(config, params, inputs_BS), targets_BS)


def edges(width: int, times: int) -> list[int]:
    """Where ranges of positions begin and end: 0, then width times 1, 2, 4 and so on to `times`."""
    doubled = itertools.takewhile(lambda n: n < times, (2**i for i in itertools.count()))
    return [0, *(width * n for n in doubled), width * times]


if __name__ == "__main__":
    main(long_context)
