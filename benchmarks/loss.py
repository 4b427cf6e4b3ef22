"""What does the loss in token chunks save in memory, and cost in time?

python benchmarks/loss.py [--d_model 512] [--chunk 256] [--dtype bfloat16] [--json]

The training loss with its gradient, in chunks and with the logits of all tokens at once.
"""

import statistics
from collections.abc import Sequence

import jax
import optax
from harness import Report, flags_only, interleaved, jax_contender, main, number, ratios

from inl_jax.model.language_model import logits
from inl_jax.model.losses import mean_loss
from inl_jax.terminal.command_line import Parser


def loss(parser: Parser, argv: Sequence[str]) -> Report:
    number(parser, "--d_model", 2048, "width")
    number(parser, "--vocab_size", 50257, "vocabulary")
    number(parser, "--tokens", 4096, "tokens, in one sequence")
    number(parser, "--chunk", 256, "tokens whose logits exist at the same time")
    number(parser, "--rounds", 3, "measurements of each")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    flags = flags_only(parser, argv)
    keys = jax.random.split(jax.random.key(0), 3)
    embedding_VD = 0.02 * jax.random.normal(keys[0], (flags.vocab_size, flags.d_model), flags.dtype)
    hidden_BSD = jax.random.normal(keys[1], (1, flags.tokens, flags.d_model), flags.dtype)
    targets_BS = jax.random.randint(keys[2], (1, flags.tokens), 0, flags.vocab_size)

    def at_once(embedding_VD, hidden_BSD):
        logits_BSV = logits({"embedding": embedding_VD}, hidden_BSD)
        return optax.softmax_cross_entropy_with_integer_labels(logits_BSV, targets_BS).mean()

    def in_chunks(embedding_VD, hidden_BSD):
        params = {"embedding": embedding_VD}
        return mean_loss(params, hidden_BSD, targets_BS, chunk=flags.chunk)

    rows, contenders = {}, {}
    for name, function in {"at once": at_once, "in chunks": in_chunks}.items():
        program = jax.jit(jax.value_and_grad(function, (0, 1)))
        compiled = program.lower(embedding_VD, hidden_BSD).compile()
        temp = compiled.memory_analysis().temp_size_in_bytes
        rows[name] = {"loss": name, "temp_bytes": temp}
        contenders[name] = jax_contender(compiled, embedding_VD, hidden_BSD)
    seconds = interleaved(contenders, flags.rounds)
    for name, row in rows.items():
        row["median_ms"] = 1000 * statistics.median(seconds[name])
        ratio = ratios(seconds[name], seconds["at once"])
        row |= zip(("time_over_at_once", "from", "to"), ratio, strict=True)
    whole, chunked = rows.values()
    record = {
        "loss_memory_ratio": whole["temp_bytes"] / chunked["temp_bytes"],
        "loss_time_ratio": chunked["time_over_at_once"],
    }
    note = (
        f"{flags.tokens} tokens, vocabulary {flags.vocab_size}, D {flags.d_model}, {flags.dtype}, "
        f"chunks of {flags.chunk}; at once takes {record['loss_memory_ratio']:.1f} times the memory"
    )
    return Report(record, list(rows.values()), [note])


if __name__ == "__main__":
    main(loss)
