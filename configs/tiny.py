"""tiny: 1,387,776 parameters (1.39M), a model to see everything work on a laptop.

    python scripts/train.py --config configs/tiny.py

Shape      D 128, 4 layers x 3 iterations, F 512, sequences of 128 tokens, decay context.
Data       the running interpreter's standard library, its own byte-level BPE of 2048 entries.
Hardware   two CPU cores. 450 updates take 3.5 minutes and 0.3 GiB on 2 cores of an AMD EPYC.
Loss       8.35 at the start, 3.81 on the validation split at the end: 1.75 bits per byte.
"""

from inl_jax.config import DataConfig, ModelConfig, OptimConfig, TrainConfig

config = TrainConfig(
    name="tiny",
    model=ModelConfig(
        vocab_size=2048,
        d_model=128,
        num_layers=4,
        num_iterations=3,
        d_ff=512,
        max_seq_len=512,
        num_heads=4,
        num_kv_heads=2,
        remat="none",
    ),
    data=DataConfig(paths=("stdlib",), tokenizer="bpe:2048", seq_len=128, validation_fraction=0.05),
    optim=OptimConfig(learning_rate=3e-3, warmup_steps=50),
    run_dir="runs/tiny",
    num_steps=450,
    batch_size=16,
    log_every=20,
    eval_every=150,
    save_every=150,
    sample_every=150,
    sample_prompt="def ",
)
