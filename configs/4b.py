"""4b: 2,524,502,784 parameters (2.52B), called "4B" in the published guide; decay context.

    inl train --config 4b --data.paths YOUR_TEXT --run_dir runs/4b

Shape      D 2304, 48 layers x 15 iterations, F 9216, sequences of up to 4096 tokens.
Contexts   Parameters with --model.context mean, as published: 2,524,171,008; attention:
           2,948,967,168; gated: 3,288,914,688; gated and --model.attention_every 4: 3,203,927,808.
Hardware   One GPU of 80 GB, or several, such as 8 with --mesh.fsdp 8.
Recipe     Chosen by the device's memory and said at the start: on one H100 16 micro-batches of 4
           sequences, remat block (inl estimate --config 4b). Other sizes: docs/memory.md.
Memory     50.8 GiB at least, with one sequence at a time, estimated for one GPU; 58.3 GiB on an
           H100. Of these, 42.3 GiB are state, which is exact from shapes: bfloat16 weights and
           float32 masters, two moments, accumulator. XLA's CUDA compiler says 50.3 GiB at least,
           and 9.3 GiB on each of 8 devices under fsdp (docs/memory.md).
Time       Not measured yet for this size; 190,000 updates of 262,144 tokens are about
           20 tokens per parameter. At 10% of its peak, which is assumed, one H100 takes 129 days
           (inl estimate --config 4b --gpus h100).
Loss       Not measured yet for this size.
"""

from inl_jax.config import DataConfig, ModelConfig, OptimConfig, TrainConfig

config = TrainConfig(
    name="4b",
    model=ModelConfig(
        d_model=2304,
        num_layers=48,
        num_iterations=15,
        d_ff=9216,
        context="decay",  # which keeps the count of the name
        max_seq_len=4096,
        num_heads=18,
        num_kv_heads=6,
        param_dtype="bfloat16",
        remat="auto",
    ),
    data=DataConfig(tokenizer="gpt2", seq_len=4096),
    optim=OptimConfig(learning_rate=1.5e-4, warmup_steps=2000),
    run_dir="runs/4b",
    num_steps=190000,
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
