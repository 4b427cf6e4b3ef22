"""3b_16gb: the 3b, 1,698,414,592 parameters (1.70B), on one GPU of 16 GB.

    export XLA_PYTHON_CLIENT_MEM_FRACTION=.95
    python scripts/train.py --config configs/3b_16gb.py --data.paths YOUR_TEXT --run_dir runs/3b

Recipe     As 3b, but masters and moments live in host memory and pass through the device one layer
           at a time; the mean over micro-batches is kept in bfloat16, rounded stochastically; the
           integrator keeps two segments and works on half a sequence at a time.
Hardware   One CUDA GPU of 16 GB, 24 GB of free host memory, which stays pinned.
Memory     13.6 GB on the device, 20.4 GB pinned on the host, by XLA's CUDA compiler; no GPU was at
           hand to see it: python scripts/estimate.py --config configs/3b_16gb.py --compile cuda
           docs/memory.md compares it with recipes that need less.
Time, loss not measured. Each update moves 41 GB over PCIe, 1.6 s at 25 GB/s, and computes on
           262,144 tokens, about 100 s at an assumed 40 TFLOP/s.
"""

from inl_jax.config import DataConfig, ModelConfig, OptimConfig, TrainConfig

config = TrainConfig(
    name="3b_16gb",
    model=ModelConfig(
        d_model=2048,
        num_layers=40,
        num_iterations=15,
        d_ff=8192,
        max_seq_len=4096,
        num_heads=16,
        num_kv_heads=4,
        param_dtype="bfloat16",
        integrator_segment=8,
        integrator_chunk=2048,
    ),
    data=DataConfig(tokenizer="gpt2", seq_len=4096),
    optim=OptimConfig(
        learning_rate=2e-4,
        warmup_steps=2000,
        state_memory="pinned_host",
        accumulator_dtype="bfloat16",
    ),
    run_dir="runs/3b_16gb",
    num_steps=130000,
    batch_size=64,
    accumulate_steps=64,
    eval_every=500,
    save_every=500,
)
