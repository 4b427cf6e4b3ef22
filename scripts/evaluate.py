"""Loss, perplexity and bits per byte of a trained model, on its validation split or on any text.

python scripts/evaluate.py --checkpoint runs/tiny [--data PATH ...] [--step best] [--json]
"""

import argparse
import dataclasses
import json
import sys

from inl_jax.cli.command_line import exit_on_input_error
from inl_jax.config import InputError
from inl_jax.console import mute, speak_to
from inl_jax.data.batches import check, eval_batches
from inl_jax.data.corpus import prepare
from inl_jax.evaluation import evaluate
from inl_jax.planning.xla import use_compile_cache
from inl_jax.sampling import LanguageModel
from inl_jax.training.run_dir import read_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="run directory")
    parser.add_argument("--step", default="latest", help="latest, best, or a saved update")
    parser.add_argument("--data", nargs="+", help="sources as in data.paths; all of their text")
    parser.add_argument("--seq_len", type=int, help="tokens per window; the run's by default")
    parser.add_argument("--batch_size", type=int, default=16, help="windows at a time")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    flags = parser.parse_args()
    with exit_on_input_error():
        if flags.batch_size < 1 or (flags.seq_len is not None and flags.seq_len < 1):
            raise InputError(
                f"--batch_size {flags.batch_size} --seq_len {flags.seq_len}: must be positive"
            )
        config = read_config(flags.checkpoint)
        speak_to(sys.stderr)  # stdout is for the result
        use_compile_cache()
        speak_to(None)
        model = LanguageModel.from_run(flags.checkpoint, step=flags.step)
        data = config.data
        if flags.data:
            data = dataclasses.replace(
                data,
                paths=tuple(flags.data),
                weights=(),
                validation_fraction=1.0,
                column="",
                max_documents=0,
            )
        data = dataclasses.replace(data, seq_len=flags.seq_len or data.seq_len)
        dataclasses.replace(config, data=data)  # checks the length against the model
        mute(True)  # only the result is printed
        corpus = prepare(data, tokenizer=model.tokenizer)
        check(corpus, model.config.vocab_size)
        batches = eval_batches(corpus, seq_len=data.seq_len, batch_size=flags.batch_size)
        result = evaluate(model.config, model.params, batches)
    rate = result.tokens / result.seconds
    if flags.json:
        print(json.dumps(result._asdict() | {"tokens_per_second": rate}))
        return
    where = ", ".join(flags.data) if flags.data else f"validation split of {', '.join(data.paths)}"
    print(
        f"{flags.checkpoint} ({flags.step}) on {where}: loss {result.loss:.6f} nats/token, "
        f"perplexity {result.perplexity:.4f}, {result.bits_per_byte:.6f} bits/byte over "
        f"{result.tokens:,} tokens; {rate:,.0f} tokens/s"
    )


if __name__ == "__main__":
    main()
