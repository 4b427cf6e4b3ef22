"""small: 43,097,088 parameters (43.10M), the published small size with the decay context.

    inl train --config small --data.paths YOUR_TEXT --run_dir runs/small

Shape      D 512, 6 layers x 5 iterations, F 2048, sequences of up to 512 tokens.
Contexts   Parameters with --model.context mean, as published: 43,087,872; attention: 46,238,208;
           gated: 47,815,680; gated and --model.attention_every 3: 47,289,856.
Hardware   One GPU of 8 GB or more; a CPU, slowly.
Memory     1.8 GiB, estimated for one GPU (inl estimate --config small). Of these, 0.6 GiB are
           state, which is exact from shapes: float32 weights, two moments, accumulator.
Time       Not measured yet for this size; 20,000 updates of 32,768 tokens are about
           15 tokens per parameter.
Loss       Not measured yet for this size.
"""

from inl_jax.config import DataConfig, ModelConfig, OptimConfig, TrainConfig

config = TrainConfig(
    name="small",
    model=ModelConfig(
        d_model=512,
        num_layers=6,
        num_iterations=5,
        d_ff=2048,
        context="decay",  # which keeps the count of the name
        max_seq_len=512,
        num_heads=4,
        num_kv_heads=2,
        param_dtype="float32",
    ),
    data=DataConfig(tokenizer="gpt2", seq_len=512),
    optim=OptimConfig(learning_rate=1e-3, warmup_steps=1000),
    run_dir="runs/small",
    num_steps=20000,
    batch_size=64,
    accumulate_steps=4,
    eval_every=500,
    save_every=500,
)
