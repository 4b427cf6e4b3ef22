"""medium: 111,924,480 parameters (111.92M), the published medium size with the decay context.

    inl train --config medium --data.paths YOUR_TEXT --run_dir runs/medium

Shape      D 768, 12 layers x 7 iterations, F 3072, sequences of up to 1024 tokens.
Contexts   Parameters with --model.context mean, as published: 111,896,832; attention: 123,705,600;
           gated: 133,158,144; gated and --model.attention_every 4: 130,795,008.
Hardware   One GPU of 16 GB or more.
Memory     4.4 GiB, estimated for one GPU (inl estimate --config medium). Of these, 1.7 GiB are
           state, which is exact from shapes: float32 weights, two moments, accumulator.
Time       Not measured yet for this size; 40,000 updates of 65,536 tokens are about
           23 tokens per parameter.
Loss       Not measured yet for this size.
"""

from inl_jax.config import DataConfig, ModelConfig, OptimConfig, TrainConfig

config = TrainConfig(
    name="medium",
    model=ModelConfig(
        d_model=768,
        num_layers=12,
        num_iterations=7,
        d_ff=3072,
        context="decay",  # which keeps the count of the name
        max_seq_len=1024,
        num_heads=6,
        num_kv_heads=2,
        param_dtype="float32",
    ),
    data=DataConfig(tokenizer="gpt2", seq_len=1024),
    optim=OptimConfig(learning_rate=6e-4, warmup_steps=1000),
    run_dir="runs/medium",
    num_steps=40000,
    batch_size=64,
    accumulate_steps=4,
    eval_every=500,
    save_every=500,
)
