"""Makes a run directory from published PyTorch weights, to evaluate, sample or `--init_from`.

inl import --weights model.pt --num_iterations 15 --out runs/published

The number of iterations is not in the file. The tokenizer is the published one, gpt2, unless named.
"""

import dataclasses
from collections.abc import Sequence

from inl_jax.config import DataConfig, InputError, TrainConfig
from inl_jax.console import say
from inl_jax.terminal import signals
from inl_jax.terminal.command_line import Parser


def main(argv: Sequence[str]) -> int:
    """The verb; returns the exit code."""
    parser = Parser("import", __doc__)
    parser.add_path("--weights", required=True, help="a .pt file that holds a state_dict")
    parser.add_argument("--num_iterations", type=int, required=True, help="T of the model")
    parser.add_path("--out", required=True, help="run directory to make")
    parser.add_argument("--tokenizer", default="gpt2", help="as data.tokenizer")
    parser.add_argument("--param_dtype", default="float32", choices=["float32", "bfloat16"])
    flags = parser.parse_flags(argv)
    if flags.num_iterations < 1:
        raise InputError(f"--num_iterations {flags.num_iterations}: must be positive")
    if flags.out.is_file() or (flags.out.exists() and any(flags.out.iterdir())):
        raise InputError(f"--out {flags.out}: not empty; name a new directory")
    from inl_jax.interop.published import config_from_torch, params_from_torch
    from inl_jax.interop.torch_file import read_state_dict
    from inl_jax.storage.checkpoint import Checkpoints
    from inl_jax.storage.identity import Identity
    from inl_jax.storage.run_dir import record_run
    from inl_jax.tokens.tokenizer import load_tokenizer

    signals.unwind()
    state_dict = read_state_dict(flags.weights)
    model = config_from_torch(
        state_dict, num_iterations=flags.num_iterations, param_dtype=flags.param_dtype
    )
    tokenizer = load_tokenizer(flags.tokenizer)
    if tokenizer.vocab_size > model.vocab_size:
        raise InputError(
            f"--tokenizer {flags.tokenizer} has {tokenizer.vocab_size} ids, the weights have "
            f"{model.vocab_size}: name the tokenizer the model was trained with"
        )
    params = params_from_torch(state_dict, model)
    config = TrainConfig(
        name="published",
        model=model,
        data=DataConfig(tokenizer=flags.tokenizer, seq_len=model.max_seq_len),
        run_dir=str(flags.out),
    )
    record_run(config, tokenizer)
    checkpoints = Checkpoints(flags.out, keep_last=1, identity=Identity(config, tokenizer))
    checkpoints.save(0, params, position={})
    checkpoints.close()
    say(f"{flags.out}: {dataclasses.asdict(model)}")
    return 0
