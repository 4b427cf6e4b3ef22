"""Makes a run directory from published PyTorch weights, to evaluate, sample or `init_from`.

python scripts/import_torch.py --weights model.pt --num_iterations 15 --out runs/published

The number of iterations is not in the file. The tokenizer is the published one, gpt2, unless named.
"""

import argparse
import dataclasses
from pathlib import Path

from inl_jax.cli.command_line import exit_on_input_error
from inl_jax.config import DataConfig, InputError, TrainConfig
from inl_jax.data.tokenizer import load_tokenizer
from inl_jax.interop.published import config_from_torch, params_from_torch
from inl_jax.training.checkpoint import Checkpoints
from inl_jax.training.run_dir import record_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", required=True, help="a .pt file holding a state_dict")
    parser.add_argument("--num_iterations", type=int, required=True, help="T of the model")
    parser.add_argument("--out", required=True, help="run directory to make")
    parser.add_argument("--tokenizer", default="gpt2", help="as data.tokenizer")
    parser.add_argument("--param_dtype", default="float32", choices=["float32", "bfloat16"])
    flags = parser.parse_args()
    with exit_on_input_error():
        if Path(flags.out).exists() and any(Path(flags.out).iterdir()):
            raise InputError(f"--out {flags.out}: not empty; name a new directory")
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
            run_dir=flags.out,
        )
        record_run(config, tokenizer)
        checkpoints = Checkpoints(flags.out, keep_last=1)
        checkpoints.save(0, params, position={})
        checkpoints.close()
    print(f"{flags.out}: {dataclasses.asdict(model)}")


def read_state_dict(path: str) -> dict:
    """Name to float array, read without running code from the file."""
    try:
        import torch
    except ImportError:
        raise InputError("reading .pt files needs PyTorch: pip install 'inl_jax[torch]'") from None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types, and advises to read unsafely
        raise InputError(
            f"--weights {path}: not a .pt file that can be read without running code from it "
            f"({type(error).__name__})"
        ) from error
    loaded = loaded.get("model_state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(loaded, dict) or not all(hasattr(v, "numpy") for v in loaded.values()):
        raise InputError(f"--weights {path}: not a state_dict (a mapping of names to tensors)")
    return {
        name: (value.float() if value.dtype == torch.bfloat16 else value).detach().numpy()
        for name, value in loaded.items()
    }


if __name__ == "__main__":
    main()
