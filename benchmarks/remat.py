"""What does recomputing save in memory, and cost in time?

python benchmarks/remat.py --config C [--section.field value ...] [--layers 2] [--tokens 512]
    [--json]

Takes the gradient of a stack of blocks under each setting of model.remat.
"""

import dataclasses
import functools
import statistics
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from harness import (
    SEGMENT,
    Report,
    check_iterations,
    config_and_flags,
    interleaved,
    jax_contender,
    main,
    number,
    ratios,
    with_gradient,
)

from inl_jax.console import say
from inl_jax.model.language_model import hidden_states, init_params
from inl_jax.terminal.command_line import Parser

# model.remat, .integrator_gradient and .integrator_segment; the first is the base of the ratios.
REMATS = (
    ("none", "lean", 1),
    ("none", "lean", SEGMENT),
    ("integrator", "lean", 1),
    ("all_but_integrator", "lean", 1),
    ("all_but_integrator", "lean", SEGMENT),
    ("block", "lean", 1),
    ("none", "autodiff", 1),
)


def remat(parser: Parser, argv: Sequence[str]) -> Report:
    number(parser, "--layers", 2, "blocks")
    number(parser, "--tokens", 512, "tokens, in one sequence")
    number(parser, "--rounds", 5, "measurements of each")
    config, flags = config_and_flags(parser, argv)
    check_iterations(config.model)
    base = dataclasses.replace(
        config.model,
        num_layers=flags.layers,
        vocab_size=1,
        dropout=0.0,
        integrator_segment=1,
        max_seq_len=max(flags.tokens, config.model.max_seq_len),
    )
    params = init_params(base, jax.random.key(config.seed))
    ids_BS = jnp.zeros((1, flags.tokens), jnp.int32)
    dy_BSD = jax.random.normal(jax.random.key(1), (1, flags.tokens, base.d_model))
    rows, contenders = [], {}
    for kind, gradient, segment in REMATS:
        say(f"compiling {kind}, {gradient}, segment {segment}")
        model = dataclasses.replace(
            base, remat=kind, integrator_gradient=gradient, integrator_segment=segment
        )
        function = functools.partial(hidden_states, model, input_ids=ids_BS)
        compiled = jax.jit(with_gradient(function)).lower(dy_BSD, params).compile()
        contenders[len(rows)] = jax_contender(compiled, dy_BSD, params)
        temp = compiled.memory_analysis().temp_size_in_bytes
        rows.append({"remat": kind, "gradient": gradient, "segment": segment, "temp_bytes": temp})
    seconds = interleaved(contenders, flags.rounds)
    for i, row in enumerate(rows):
        row["memory_over_none"] = row["temp_bytes"] / rows[0]["temp_bytes"]
        row["median_ms"] = 1000 * statistics.median(seconds[i])
        ratio = ratios(seconds[i], seconds[0])
        row |= zip(("time_over_none", "from", "to"), ratio, strict=True)
    note = (
        f"{config.name}: {flags.layers} blocks, {base.context_text}, D {base.d_model}, "
        f"T {base.num_iterations}, {flags.tokens} tokens; temp_bytes and time of the gradient"
    )
    return Report({}, rows, [note])


if __name__ == "__main__":
    main(remat)
