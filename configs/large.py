"""large: 303,621,120 parameters (303.62M), the published large size with the decay context.

    inl train --config large --data.paths YOUR_TEXT --run_dir runs/large

Shape      D 1024, 24 layers x 10 iterations, F 4096, sequences of up to 2048 tokens.
Contexts   Parameters with --model.context mean, as published: 303,547,392; attention: 341,326,848;
           gated: 379,118,592; gated and --model.attention_every 4: 369,670,656.
Hardware   One GPU of 10 GB or more.
Recipe     Chosen by the device's memory and said at the start: on one H100 4 micro-batches of 16
           sequences, remat block (inl estimate --config large). Other sizes: docs/memory.md.
Memory     6.5 GiB at least, with one sequence at a time, estimated for one GPU; 12.4 GiB on an
           H100. Of these, 4.5 GiB are state, which is exact from shapes: float32 weights, two
           moments, accumulator.
Time       Not measured yet for this size; 50,000 updates of 131,072 tokens are about
           22 tokens per parameter.
Loss       Not measured yet for this size.
"""

from inl_jax.config import DataConfig, ModelConfig, OptimConfig, TrainConfig

config = TrainConfig(
    name="large",
    model=ModelConfig(
        d_model=1024,
        num_layers=24,
        num_iterations=10,
        d_ff=4096,
        context="decay",  # which keeps the count of the name
        max_seq_len=2048,
        num_heads=8,
        num_kv_heads=2,
        param_dtype="float32",
        remat="auto",
    ),
    data=DataConfig(tokenizer="gpt2", seq_len=2048),
    optim=OptimConfig(learning_rate=3e-4, warmup_steps=2000),
    run_dir="runs/large",
    num_steps=50000,
    batch_size=64,
    accumulate_steps="auto",
    eval_every=500,
    save_every=500,
)
