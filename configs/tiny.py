from inl_jax.config import DataConfig, ModelConfig, OptimConfig, TrainConfig

config = TrainConfig(
    name="tiny",
    model=ModelConfig(
        vocab_size=2048,
        d_model=192,
        num_layers=4,
        num_iterations=3,
        d_ff=768,
        max_seq_len=256,
        num_heads=3,
        num_kv_heads=3,
        remat="none",
    ),
    data=DataConfig(paths=("stdlib",), tokenizer="bpe:2048", seq_len=128, validation_fraction=0.05),
    optim=OptimConfig(learning_rate=3e-3, warmup_steps=50),
    run_dir="runs/tiny",
    num_steps=600,
    batch_size=16,
    log_every=20,
    eval_every=200,
    save_every=200,
    sample_prompt="def ",
)
