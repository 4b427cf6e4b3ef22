"""Makes a run directory from an exported model or published PyTorch weights, to evaluate or sample.

inl import --weights exported --out runs/imported
inl import --weights model.pt --num_iterations 15 --out runs/published

A .pt file tells neither its iterations nor its tokenizer, which is the published one, gpt2, unless
named. The text that the weights were validated on is not known: name some to `inl evaluate`.
"""

import dataclasses
import os
from collections.abc import Sequence

from inl_jax.config import DataConfig, InputError, MeshConfig, ModelConfig, TrainConfig
from inl_jax.console import say
from inl_jax.terminal import signals
from inl_jax.terminal.command_line import Parser


def main(argv: Sequence[str]) -> int:
    """The verb; returns the exit code."""
    parser = Parser("import", __doc__)
    parser.add_path(
        "--weights", required=True, help="an exported directory, or a .pt file with a state_dict"
    )
    parser.add_argument("--num_iterations", type=int, help="T of the model, for a .pt file")
    parser.add_path("--out", required=True, help="run directory to make")
    parser.add_argument("--tokenizer", help="as data.tokenizer; the directory's, or gpt2")
    parser.add_argument(
        "--param_dtype", choices=["float32", "bfloat16"], help="the exported one, or float32"
    )
    flags = parser.parse_flags(argv)
    if os.path.lexists(flags.out) and not (flags.out.is_dir() and not any(flags.out.iterdir())):
        raise InputError(f"--out {flags.out}: is there and no empty directory; name a new one")
    from inl_jax.initial_weights import find_weights, kind_of
    from inl_jax.model.platform.kernels import with_kernels_found_here
    from inl_jax.parallel.sharding import make_mesh, param_shardings
    from inl_jax.planning.preflight import describe_model
    from inl_jax.storage.checkpoint import Checkpoints
    from inl_jax.storage.identity import Identity
    from inl_jax.storage.run_dir import record_run
    from inl_jax.tokens.tokenizer import FILE_NAME, load_tokenizer

    signals.unwind()
    kind = kind_of(flags.weights)
    if kind == "run":
        raise InputError(
            f"--weights {flags.weights}: is a run already; use it as it is, in inl evaluate "
            f"{flags.weights} or --init_from {flags.weights}"
        )
    if kind == "published" and flags.num_iterations is None:
        raise InputError(
            f"--num_iterations is missing: {flags.weights} does not tell it; give the T that it "
            "was trained with, as in --num_iterations 15"
        )
    asked = {} if flags.num_iterations is None else {"num_iterations": flags.num_iterations}
    weights = find_weights(flags.weights, ModelConfig(**asked))
    if flags.num_iterations not in (None, weights.model.num_iterations):
        raise InputError(
            f"--num_iterations {flags.num_iterations}: {flags.weights} has "
            f"{weights.model.num_iterations}; leave it out"
        )
    model = weights.model
    if flags.param_dtype:
        model = dataclasses.replace(model, param_dtype=flags.param_dtype)
    if kind == "exported" and not flags.tokenizer and not (flags.weights / FILE_NAME).exists():
        raise InputError(
            f"--tokenizer is missing: there is no {flags.weights / FILE_NAME}; name one"
        )
    name = flags.tokenizer or (str(flags.weights) if kind == "exported" else "gpt2")
    tokenizer = load_tokenizer(name)
    if tokenizer.vocab_size > model.vocab_size:
        raise InputError(
            f"--tokenizer {name} has {tokenizer.vocab_size} ids, the weights have "
            f"{model.vocab_size}: name the tokenizer the model was trained with"
        )
    one_device = make_mesh(MeshConfig(data=1))
    what, params = weights.read(model.param_dtype, param_shardings(one_device, model))
    say(f"{flags.weights}: {what}")
    config = TrainConfig(
        name=flags.weights.absolute().name if kind == "exported" else "published",
        model=model,
        data=DataConfig(tokenizer=flags.tokenizer or tokenizer.name, seq_len=model.max_seq_len),
        run_dir=str(flags.out),
    )
    record_run(config, tokenizer)
    checkpoints = Checkpoints(flags.out, keep_last=1, identity=Identity(config, tokenizer))
    checkpoints.save(0, params, position={})
    checkpoints.close()
    say(describe_model(dataclasses.replace(config, model=with_kernels_found_here(model))))
    say(f"{flags.out}: its validation text is not known: inl evaluate {flags.out} --data TEXT")
    return 0
