"""xlarge: 807,997,952 parameters (808.00M), the published xlarge size with the decay context.

    inl train --config xlarge --data.paths YOUR_TEXT --run_dir runs/xlarge

Shape      D 1536, 32 layers x 12 iterations, F 6144, sequences of up to 4096 tokens.
Contexts   Parameters with --model.context mean, as published: 807,850,496; attention: 933,736,960;
           gated: 1,034,490,368; gated and --model.attention_every 4: 1,009,302,016.
Hardware   One GPU of 80 GB, or several with --mesh.fsdp N.
Recipe     Chosen by the device's memory and said at the start: on one H100 8 micro-batches of 8
           sequences, remat block (inl estimate --config xlarge). Other sizes: docs/memory.md.
Memory     17.2 GiB at least, with one sequence at a time, estimated for one GPU; 26.7 GiB on an
           H100. Of these, 13.5 GiB are state, which is exact from shapes: bfloat16 weights and
           float32 masters, two moments, accumulator.
Time       Not measured yet for this size; 60,000 updates of 262,144 tokens are about
           19 tokens per parameter.
Loss       Not measured yet for this size.
"""

from inl_jax.config import DataConfig, ModelConfig, OptimConfig, TrainConfig

config = TrainConfig(
    name="xlarge",
    model=ModelConfig(
        d_model=1536,
        num_layers=32,
        num_iterations=12,
        d_ff=6144,
        context="decay",  # which keeps the count of the name
        max_seq_len=4096,
        num_heads=12,
        num_kv_heads=4,
        param_dtype="bfloat16",
        remat="auto",
    ),
    data=DataConfig(tokenizer="gpt2", seq_len=4096),
    optim=OptimConfig(learning_rate=2e-4, warmup_steps=2000),
    run_dir="runs/xlarge",
    num_steps=60000,
    batch_size=64,
    accumulate_steps="auto",
    eval_every=500,
    save_every=500,
)
