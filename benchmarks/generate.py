"""How fast are prefill and decoding?

python benchmarks/generate.py --config C [--section.field value ...] [--checkpoint RUN] [--json]

A row is one batch size, one position and one room, the length that the cache of attention is made
for: prefill of prompts as long as the position, then greedy decoding, all tokens in one loop and as
they are streamed. Time should follow the position and not the room.
"""

import functools
import itertools
import statistics
from collections.abc import Sequence

import jax
import numpy as np
from harness import Report, config_and_flags, interleaved, main, number

from inl_jax.config import InputError, ModelConfig
from inl_jax.console import say
from inl_jax.model.language_model import init_params
from inl_jax.sampling import Sampling
from inl_jax.sampling.decoding import begin, pieces, prefill
from inl_jax.sampling.text import PIECE
from inl_jax.storage.weights import read_params
from inl_jax.terminal.command_line import Parser


def generate(parser: Parser, argv: Sequence[str]) -> Report:
    parser.add_argument("--checkpoint", help="run directory; random weights without it")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 32, 64])
    parser.add_argument("--positions", type=int, nargs="+", default=[100, 4000])
    parser.add_argument("--rooms", type=int, nargs="+", help="tokens; by default what is needed")
    number(parser, "--new_tokens", 64, "tokens to decode after each prompt")
    number(parser, "--rounds", 3, "measurements of each")
    config, flags = config_and_flags(parser, argv)
    c, new = config.model, flags.new_tokens
    last = c.max_seq_len - new
    if last < 1:
        raise InputError(f"--new_tokens {new}: must be below model.max_seq_len={c.max_seq_len}")
    if max(flags.positions) > last:
        say(f"positions are lowered to {last}, because model.max_seq_len is {c.max_seq_len}")
    if flags.checkpoint:
        params = read_params(flags.checkpoint, c)[1]
    else:
        params = init_params(c, jax.random.key(config.seed))
    rows = []
    positions = dict.fromkeys(min(p, last) for p in flags.positions)
    for batch_size, position in itertools.product(flags.batch_sizes, positions):
        for room in flags.rooms or [position + new]:
            room = max(room, position + new)
            seconds = generating(c, params, batch_size, position, room, new, flags.rounds)
            row = {"batch_size": batch_size, "position": position, "room": room}
            for what, tokens in {"prefill": position, "decode": new, "streamed": new}.items():
                rate = batch_size * tokens / statistics.median(seconds[what])
                row[f"{what}_tokens_per_second"] = rate
            rows.append(row)
    weights = flags.checkpoint or "random weights"
    return Report({}, rows, [f"{config.name}, {weights}, {new} new tokens, decoded greedily"])


def generating(
    config: ModelConfig,
    params,
    batch_size: int,
    position: int,
    room: int,
    new_tokens: int,
    rounds: int,
) -> dict[str, list[float]]:
    """Seconds of prefill, and of decoding after it, in one loop and in pieces."""
    shape = (batch_size, position)
    ids_BP = np.random.default_rng(0).integers(config.vocab_size, size=shape, dtype=np.int32)
    length_B = np.full(batch_size, position)

    def read():
        found = prefill(config, params, ids_BP, length_B, max_len=room)
        rows = begin(*found, ids_BP, Sampling(), seed=0, num_ids=config.vocab_size)
        ready.append(jax.block_until_ready(rows))

    def decode(size):  # takes over the rows, so a prefill must come before each call
        for _ in pieces(
            config,
            params,
            ready.pop(),
            Sampling(),
            size=size,
            max_new_tokens=new_tokens,
            end_id=None,
            num_ids=config.vocab_size,
            mesh=None,
        ):
            pass

    ready: list = []
    return interleaved(
        {
            "prefill": read,
            "decode": functools.partial(decode, new_tokens),
            "prefill again": read,
            "streamed": functools.partial(decode, PIECE),
        },
        rounds,
    )


if __name__ == "__main__":
    main(generate)
