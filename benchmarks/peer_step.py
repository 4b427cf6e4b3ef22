"""A training step of ours, or of the PyTorch twin, for peers.py.

python benchmarks/peer_step.py CASE CONTENDER UPDATES

As a program its last line is the most bytes that a process held which made these updates and
nothing else: each side is imported only where it runs.
"""

import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from inl_jax.config import DataConfig, InputError, ModelConfig, TrainConfig, with_fields
from inl_jax.limits import usable_cpus


def case(width, layers, heads, sequences, seq_len, vocab_size) -> TrainConfig:
    """A step of a plain transformer."""
    model = ModelConfig(
        vocab_size=vocab_size,
        d_model=width,
        num_layers=layers,
        num_iterations=0,
        d_ff=4 * width,
        max_seq_len=seq_len,
        context="attention",
        num_heads=heads,
        num_kv_heads=heads,
        remat="none",
    )
    data = DataConfig(paths=("stdlib",), seq_len=seq_len)
    return TrainConfig(model=model, data=data, batch_size=sequences, accumulate_steps=1)


CASES = {
    "128 wide": case(128, 4, 4, sequences=12, seq_len=64, vocab_size=65),
    "512 wide": case(512, 6, 8, sequences=8, seq_len=256, vocab_size=65),
    "512 wide, 50,257 tokens": case(512, 6, 8, sequences=8, seq_len=256, vocab_size=50257),
}
CONTENDERS = {
    "torch": {},
    "attention": {},
    "gated": {"model.context": "gated"},
    "decay": {"model.context": "decay", "model.num_iterations": 3},
}


def step(name: str, contender: str) -> Callable[[int], None]:
    """A function that makes so many updates and waits for them."""
    make = torch_step if contender == "torch" else our_step
    return make(with_fields(CASES[name], CONTENDERS[contender]))


def torch_step(config: TrainConfig) -> Callable[[int], None]:
    """Updates of the twin, on as many threads as there are CPUs."""
    try:
        import torch
        from torch_twin import make_update
    except ImportError as error:
        raise InputError(f"{error}: pip install 'inl_jax[torch]'") from error
    torch.set_num_threads(usable_cpus())
    update, batch = make_update(config), torch.from_numpy(tokens(config)).long()

    def run(updates):
        for _ in range(updates):
            update(batch)

    return run


def our_step(config: TrainConfig) -> Callable[[int], None]:
    """Updates of our training step, its state donated and made first, as in a run."""
    import jax

    from inl_jax.model.language_model import param_count
    from inl_jax.parallel.sharding import make_mesh, on, place, shardings_of
    from inl_jax.training.compile_options import compile_options
    from inl_jax.training.state import init_state, make_layout
    from inl_jax.training.step import compile_step

    mesh = make_mesh(config.mesh)
    layout = make_layout(config, mesh)
    fresh = jax.jit(
        functools.partial(init_state, config=config),
        out_shardings=shardings_of(layout.state),
        compiler_options=compile_options(mesh, param_count(config.model), once=True),
    )
    with on(mesh):
        state = fresh(jax.random.key(0))
        compiled = compile_step(config, mesh, layout)
        batch, learning_rate = place(mesh, tokens(config)), np.float32(config.optim.learning_rate)

    def run(updates):
        nonlocal state
        for _ in range(updates):
            state, _ = compiled(state, batch, learning_rate)
        jax.block_until_ready(state)

    return run


def tokens(config: TrainConfig) -> np.ndarray:
    """Random sequences of one batch, int32 [B, S + 1]."""
    shape = (config.batch_size, config.data.seq_len + 1)
    return np.random.default_rng(0).integers(config.model.vocab_size, size=shape, dtype=np.int32)


def peak_bytes() -> int:
    """The most bytes that this process has held. (`ru_maxrss` counts its parent's too.)"""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])


if __name__ == "__main__":
    name, contender, updates = sys.argv[1:]
    step(name, contender)(int(updates))
    print(peak_bytes())
