"""Continues prompts with a trained model.

inl generate runs/tiny --prompt "def fibonacci(n):" "import os"
inl generate runs/tiny --prompt_file part.py --stop "class " "def " --json
inl generate runs/tiny --interactive

Prompts come from --prompt, --prompt_file or a pipe. One text is shown as it comes; several are
continued in one batch.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence

from inl_jax.checks import require
from inl_jax.console import show
from inl_jax.files import json_text
from inl_jax.terminal import signals
from inl_jax.terminal.command_line import (
    Parser,
    add_depth_flags,
    add_mesh_flags,
    at_depth,
    lines_on_stderr,
    mesh_from,
)
from inl_jax.terminal.prompts import read_prompts


def main(argv: Sequence[str]) -> int:
    """The verb; returns the exit code."""
    parser = Parser("generate", __doc__)
    parser.add_run()
    parser.add_argument("--step", default="latest", help="latest, best, or a saved update")
    parser.add_argument(
        "--prompt", nargs="+", default=[], metavar="TEXT", help="one or more; - reads stdin"
    )
    parser.add_path(
        "--prompt_file", nargs="+", default=[], metavar="FILE", help="each file is one prompt"
    )
    parser.add_argument("--interactive", action="store_true", help="continue lines as you type")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="for each text")
    parser.add_argument(
        "--stop", nargs="+", default=[], metavar="STRING", help="end before the first of these"
    )
    parser.add_argument("--num_samples", type=int, default=1, help="texts for each prompt")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token")
    parser.add_argument("--top_k", type=int, default=0, help="draw from the k likeliest; 0: all")
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="draw from the likeliest tokens of probability p"
    )
    parser.add_argument(
        "--min_p", type=float, default=0.0, help="leave out tokens below p times the likeliest"
    )
    parser.add_argument(
        "--repetition_penalty", type=float, default=1.0, help="above 1: repeat tokens less"
    )
    parser.add_argument("--seed", type=int, default=0, help="decides the draw")
    parser.add_argument("--ignore_end", action="store_true", help="generate past the end token")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    add_depth_flags(parser)
    add_mesh_flags(parser)
    flags = parser.parse_flags(argv)
    check(flags)
    given = [""] if flags.interactive and not (flags.prompt or flags.prompt_file) else flags.prompt
    prompts = read_prompts(given, flags.prompt_file)
    from inl_jax.planning.programs.xla import use_compile_cache
    from inl_jax.sampling import LanguageModel, Sampling
    from inl_jax.storage.run_dir import read_config
    from inl_jax.terminal.chat import Chat
    from inl_jax.terminal.texts import say_what_was_made, show_finished, show_growing

    names = [field.name for field in dataclasses.fields(Sampling)]
    Sampling(**{name: getattr(flags, name) for name in names})  # checks them
    names += ["max_new_tokens", "stop", "seed", "ignore_end"]
    settings = {name: getattr(flags, name) for name in names}
    at_depth(read_config(flags.checkpoint).model, flags)  # a mistake is told before a long read
    signals.unwind(patience=None if flags.interactive else signals.PATIENCE)
    with lines_on_stderr():
        use_compile_cache()
        with signals.held():
            model = LanguageModel.from_run(flags.checkpoint, step=flags.step, mesh=mesh_from(flags))
        model = dataclasses.replace(model, config=at_depth(model.config, flags))
        if flags.interactive:
            Chat(model, prompts[0], settings).run()
            return 0
        start = time.perf_counter()
        if flags.json or len(prompts) * flags.num_samples > 1:
            texts = model.continuations(prompts, num_samples=flags.num_samples, **settings)
        else:
            texts = show_growing(model, prompts[0], **settings)
        if flags.json:
            samples = [text.record() for text in texts]
            asked = {
                "checkpoint": str(flags.checkpoint),
                "step": flags.step,
                "iterations": model.config.num_iterations,
                "tol": model.config.tol,
            }
            show(json_text(asked | {"settings": settings, "samples": samples}))
        elif len(texts) > 1:
            show_finished(texts)
        say_what_was_made(texts, time.perf_counter() - start)
    return 0


def check(flags) -> None:
    """Raises `InputError` for what can be seen before anything heavy is imported."""
    run = flags.checkpoint
    require(run.is_dir(), f"{run}: not a run directory (there is no such directory)")
    for name in ("num_samples", "max_new_tokens"):
        number = getattr(flags, name)
        require(number > 0, f"--{name} {number}: must be positive")
    require(0 <= flags.seed < 2**32, f"--seed {flags.seed}: must lie between 0 and 2**32 - 1")
    require(all(flags.stop), "--stop: a string is empty; give at least one character")
    if flags.interactive:
        require(sys.stdin is not None, "--interactive reads lines from stdin, which is closed")
        require(
            not flags.json and flags.num_samples == 1,
            "--interactive answers one line at a time: leave out --json and --num_samples",
        )
        require(
            len(flags.prompt) + len(flags.prompt_file) <= 1 and flags.prompt != ["-"],
            "--interactive begins with one prompt at most, and reads lines from stdin",
        )
