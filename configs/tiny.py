"""tiny: 1,124,736 parameters (1.12M), a model to see everything work on a laptop.

    inl train --config tiny

Shape      D 128, 4 layers x 1 iteration with dt 1, F 512, sequences of 128 tokens, gated context,
           which learned most from 1M tokens (docs/learning.md). It was 1,387,776 parameters before:
           --model.context decay --model.num_iterations 3 --model.dt .1 --model.controller_width 64
Data       The standard library of the running Python; a byte-level BPE of 2,048 entries, trained on
           it.
Hardware   Two CPU cores.
Memory     0.1 GiB, estimated for bfloat16 products on one GPU; 0.3 GiB measured on the CPU.
Time       450 updates take 1.5 minutes on 2 cores of an AMD EPYC.
Loss       8.13 at the start, 3.45 on the validation split at the end, which is 1.58 bits per byte
           (1.74 before).
"""

from inl_jax.config import DataConfig, ModelConfig, OptimConfig, TrainConfig

config = TrainConfig(
    name="tiny",
    model=ModelConfig(
        vocab_size=2048,
        d_model=128,
        num_layers=4,
        num_iterations=1,
        controller_width=8,
        dt=1.0,
        d_ff=512,
        max_seq_len=512,
        num_heads=4,
        num_kv_heads=2,
        remat="none",
    ),
    data=DataConfig(paths=("stdlib",), tokenizer="bpe:2048", seq_len=128, validation_fraction=0.05),
    optim=OptimConfig(learning_rate=5e-3, warmup_steps=50),
    run_dir="runs/tiny",
    num_steps=450,
    batch_size=16,
    log_every=20,
    eval_every=150,
    save_every=150,
    sample_every=150,
    sample_prompts=("def ",),
)
