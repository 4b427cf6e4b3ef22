"""Continues prompts with a trained model.

python scripts/generate.py --checkpoint runs/tiny --prompt "def fibonacci(n):" "import os"

Several prompts of any lengths are continued in one batch.
"""

import argparse
import sys
import time

from inl_jax.cli.command_line import exit_on_input_error
from inl_jax.console import speak_to
from inl_jax.planning.xla import use_compile_cache
from inl_jax.sampling import LanguageModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="run directory")
    parser.add_argument("--step", default="latest", help="latest, best, or a saved update")
    parser.add_argument("--prompt", nargs="+", default=[""], help="one or more")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="for each prompt")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token")
    parser.add_argument("--top_k", type=int, default=0, help="draw from the k likeliest; 0: all")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw from the likeliest share p")
    parser.add_argument("--seed", type=int, default=0, help="decides the draw")
    parser.add_argument("--ignore_end", action="store_true", help="go on past the end token")
    flags = parser.parse_args()
    with exit_on_input_error():
        model = LanguageModel.from_run(flags.checkpoint, step=flags.step)
        speak_to(sys.stderr)  # stdout is for the result
        use_compile_cache()
        speak_to(None)
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
        print(f"{prompt}{text}\n{'-' * 40}")
    print(
        f"{len(texts)} x {flags.max_new_tokens} tokens at most in "
        f"{time.perf_counter() - start:.1f} s, compilation included"
    )


if __name__ == "__main__":
    main()
