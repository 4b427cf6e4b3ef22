"""3b: 1,698,414,592 parameters (1.70B), called "3B" in the published guide; decay context.

    inl train --config 3b --data.paths YOUR_TEXT --run_dir runs/3b

Shape      D 2048, 40 layers x 15 iterations, F 8192, sequences of up to 4096 tokens.
Contexts   Parameters with --model.context mean, as published: 1,698,168,832; attention:
           1,949,919,232; gated: 2,201,731,072; gated and --model.attention_every 4: 2,138,778,112.
Hardware   One GPU of 80 GB, or several, such as 8 with --mesh.fsdp 8.
Recipe     Chosen by the device's memory and said at the start: on one H100 16 micro-batches of 4
           sequences, remat block (inl estimate --config 3b). Other sizes: docs/memory.md.
Memory     34.6 GiB at least, with one sequence at a time, estimated for one GPU; 41.0 GiB on an
           H100. Of these, 28.5 GiB are state, which is exact from shapes: bfloat16 weights and
           float32 masters, two moments, accumulator. XLA's CUDA compiler says 34.8 and 41.8 GiB,
           and 6.8 GiB at least on each of 8 devices under fsdp (docs/memory.md).
Time       Not measured yet for this size; one H100 is predicted to train at most 10,160 tokens/s
           (python benchmarks/cuda_program.py --config configs/3b.py). 130,000 updates of 262,144
           tokens are about 20 tokens per parameter: 39 days at that bound, 15.8% of the peak, and
           61 days at 10%, which is assumed (inl estimate --config 3b --gpus h100).
Loss       Not measured yet for this size.
"""

from inl_jax.config import DataConfig, ModelConfig, OptimConfig, TrainConfig

config = TrainConfig(
    name="3b",
    model=ModelConfig(
        d_model=2048,
        num_layers=40,
        num_iterations=15,
        d_ff=8192,
        context="decay",  # which keeps the count of the name
        max_seq_len=4096,
        num_heads=16,
        num_kv_heads=4,
        param_dtype="bfloat16",
        remat="auto",
    ),
    data=DataConfig(tokenizer="gpt2", seq_len=4096),
    optim=OptimConfig(learning_rate=2e-4, warmup_steps=2000),
    run_dir="runs/3b",
    num_steps=130000,
    batch_size=64,
    accumulate_steps="auto",
    eval_every=500,
    save_every=500,
    sample_every=5000,
    sample_prompts=(
        "def fibonacci(n):",
        "La capitale de la France est",
        "Pour implémenter un réseau de neurones",
    ),
)
