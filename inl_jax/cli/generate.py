"""Continues prompts with a trained model.

inl generate runs/tiny --prompt "def fibonacci(n):" "import os"

Prompts of any lengths are continued in one batch.
"""

import dataclasses
import time
from collections.abc import Sequence

from inl_jax.console import show
from inl_jax.terminal import signals
from inl_jax.terminal.command_line import (
    Parser,
    add_depth_flags,
    add_mesh_flags,
    at_depth,
    lines_on_stderr,
    mesh_from,
)


def main(argv: Sequence[str]) -> int:
    """The verb; returns the exit code."""
    parser = Parser("generate", __doc__)
    parser.add_run()
    parser.add_argument("--step", default="latest", help="latest, best, or a saved update")
    parser.add_argument("--prompt", nargs="+", default=[""], help="one or more")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="for each prompt")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token")
    parser.add_argument("--top_k", type=int, default=0, help="draw from the k likeliest; 0: all")
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="draw from the likeliest tokens of probability p"
    )
    parser.add_argument("--seed", type=int, default=0, help="decides the draw")
    parser.add_argument("--ignore_end", action="store_true", help="generate past the end token")
    add_depth_flags(parser)
    add_mesh_flags(parser)
    flags = parser.parse_flags(argv)
    from inl_jax.planning.xla import use_compile_cache
    from inl_jax.sampling import LanguageModel

    signals.unwind()
    with lines_on_stderr():
        use_compile_cache()
    with signals.held():
        model = LanguageModel.from_run(flags.checkpoint, step=flags.step, mesh=mesh_from(flags))
    model = dataclasses.replace(model, config=at_depth(model.config, flags))
    settings = {"end_id": None} if flags.ignore_end else {}
    start = time.perf_counter()
    texts = model.generate(
        flags.prompt,
        max_new_tokens=flags.max_new_tokens,
        temperature=flags.temperature,
        top_k=flags.top_k,
        top_p=flags.top_p,
        seed=flags.seed,
        **settings,
    )
    for prompt, text in zip(flags.prompt, texts, strict=True):
        show(f"{prompt}{text}\n{'-' * 40}")
    show(
        f"{len(texts)} x {flags.max_new_tokens} tokens at most in "
        f"{time.perf_counter() - start:.1f} s, compilation included"
    )
    return 0
