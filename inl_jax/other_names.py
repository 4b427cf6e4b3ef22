"""What other programs call our flags: an unknown flag is answered with ours."""

import difflib
import re
from collections.abc import Iterable, Sequence

from inl_jax.config import InputError, field_types

# A word in braces is replaced with the value that was given.
_RESUME = "give the same command again; a run resumes from its --run_dir"
_TRACKERS = "write --track {TRACKER}, one or more of tensorboard, wandb and trackio"
_ROWS = "write --batch_size N, the sequences of one update over all devices and micro-batches"
_LENGTH = "write --data.seq_len {N}, and --model.max_seq_len {N} if the model is built for fewer"
_TYPES = (
    "write --model.compute_dtype bfloat16 (or float32) for matrix products, "
    "and --model.param_dtype bfloat16 (or float32) for the parameters"
)
_ARCHITECTURE = "write --config NAME for an architecture, and --init_from RUN_DIR for its weights"

_ANSWERS = {
    ("lr",): "write --optim.learning_rate {RATE}",
    ("min_lr",): "write --optim.final_lr_fraction F, a fraction of the peak",
    ("epochs", "num_train_epochs", "max_epochs"): "write --num_epochs {N} --num_steps 0",
    ("max_steps", "max_iters", "steps", "iters", "train_steps"): "write --num_steps {N}",
    ("tokens", "num_tokens", "total_tokens", "max_tokens", "train_tokens"): (
        "write --num_steps N, the tokens divided by --batch_size times --data.seq_len"
    ),
    ("resume", "resume_from", "resume_from_checkpoint", "ckpt_path", "init_from_ckpt"): _RESUME,
    ("output_dir", "out_dir", "save_dir", "out"): "write --run_dir {DIR}",
    ("report_to", "logger", "tracker", "log_with"): _TRACKERS,
    ("wandb", "use_wandb", "wandb_log"): "write --track wandb",
    ("tensorboard", "use_tensorboard", "logging_dir"): "write --track tensorboard",
    ("wandb_project", "project_name"): "write --track wandb --project {NAME}",
    ("wandb_run_name", "run_name"): (
        "write --run_dir {DIR}; trackers call a run as its directory is called"
    ),
    ("gradient_accumulation_steps", "grad_accum_steps", "accumulate_grad_batches"): (
        "write --accumulate_steps {N}; it splits --batch_size, the sequences of one update"
    ),
    (
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "micro_batch_size",
        "device_batch_size",
        "global_batch_size",
        "total_batch_size",
    ): _ROWS,
    (
        "dataset",
        "dataset_name",
        "data",
        "data_dir",
        "data_path",
        "train_data",
        "train_file",
        "input_file",
    ): "write --data.paths {PATH}",
    ("curriculum", "curriculum_learning", "data_stages", "stages"): (
        "write --data.phases PHASES, as in 0.5:1,0 0.5:1,1: the share of each in the run, and a "
        "weight per path"
    ),
    ("tokenizer_name", "tokenizer_path"): "write --data.tokenizer {NAME}",
    (
        "block_size",
        "max_seq_length",
        "max_length",
        "context_length",
        "sequence_length",
        "seq_length",
    ): _LENGTH,
    ("n_layer", "n_layers", "num_hidden_layers"): "write --model.num_layers {N}",
    ("n_embd", "hidden_size", "embed_dim", "dim"): "write --model.d_model {N}",
    ("n_head", "n_heads", "num_attention_heads"): "write --model.num_heads {N}",
    ("n_kv_heads", "num_key_value_heads"): "write --model.num_kv_heads {N}",
    ("intermediate_size", "ffn_dim"): "write --model.d_ff {N}",
    ("attn_layer_period", "full_attention_interval"): "write --model.attention_every {N}",
    ("dtype", "bf16", "fp16", "precision", "mixed_precision", "torch_dtype"): _TYPES,
    ("gradient_checkpointing", "activation_checkpointing", "checkpoint_activations"): (
        "write --model.remat block"
    ),
    ("wd",): "write --optim.weight_decay {RATE}",
    ("lr_scheduler_type", "lr_scheduler", "lr_schedule", "lr_decay_style", "scheduler"): (
        "write --optim.schedule cosine, or wsd, or constant; the warmup is linear"
    ),
    ("warmup", "warmup_iters", "lr_warmup_steps", "num_warmup_steps"): (
        "write --optim.warmup_steps {N}"
    ),
    ("grad_clip", "clip_grad", "max_grad_norm", "gradient_clip_val"): (
        "write --optim.clip_norm {NORM}"
    ),
    ("beta1", "adam_beta1"): "write --optim.b1 {B}",
    ("beta2", "adam_beta2"): "write --optim.b2 {B}",
    ("adam_epsilon", "epsilon"): "write --optim.eps {EPS}",
    ("eval_interval", "eval_steps"): "write --eval_every {N}",
    ("early_stopping_patience",): "write --patience {N}, in evaluations",
    ("early_stopping",): "write --patience N, the evaluations without an improvement that stop it",
    ("early_stopping_threshold", "early_stopping_min_delta"): "write --min_delta {NATS}",
    ("sample_prompt", "prompt", "prompts", "test_prompts"): (
        "write --sample_prompts {TEXT} --sample_every N"
    ),
    ("log_interval", "logging_steps"): "write --log_every {N}",
    ("save_interval", "save_steps"): "write --save_every {N}",
    ("save_total_limit",): "write --keep_last {N}",
    ("model", "model_name", "model_name_or_path", "pretrained"): _ARCHITECTURE,
    ("deepspeed",): (
        "write --mesh.fsdp N for ZeRO-3, with --mesh.fsdp_shards optimizer for ZeRO-1 and 2"
    ),
    ("fsdp",): "write --mesh.fsdp N, the number of devices that share the parameters",
    ("tensor_parallel", "tensor_parallel_size", "tensor_model_parallel_size"): (
        "write --mesh.tensor {N}"
    ),
    (
        "device",
        "gpus",
        "num_gpus",
    ): "not needed, JAX takes the GPUs it finds; JAX_PLATFORMS=cpu chooses the CPU",
}
ANSWERS = {name: answer for names, answer in _ANSWERS.items() for name in names}


def check_names(argv: Sequence[str], *, own: Iterable[str]) -> None:
    """Raises `InputError` for the first flag that is not ours, with the one to write instead.

    Args:
      argv: the command line, with underscores in the names.
      own: the flags that the verb has beside the fields of the config.
    """
    known = {*own, *(f"--{field}" for field in field_types())}
    for i, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if not flag.startswith("--") or flag in known:
            continue
        if not equals and i + 1 < len(argv) and not argv[i + 1].startswith("--"):
            value = argv[i + 1]
        if answer := answer_to(flag[2:], value):
            raise InputError(f"{flag}: {answer}")
        if flag.startswith("--xla_"):
            raise InputError(f"{flag}: write --xla_flags='{word}'")
        raise InputError(f"{flag}: no such flag{closest(flag, known)}")


def closest(flag: str, known: Iterable[str]) -> str:
    """How a message about an unknown flag ends: the flag that was meant, or where they stand."""
    found = difflib.get_close_matches(flag, sorted(known), n=1)
    return f"; the closest is {found[0]}" if found else "; --help lists them"


def answer_to(name: str, value: str = "") -> str:
    """What to write instead of `--name value`; empty if nobody calls a flag so."""
    if name in ANSWERS:
        return re.sub(r"{(\w+)}", lambda word: value or word[1], ANSWERS[name])
    full = [f"--{field}" for field in field_types() if field.endswith(f".{name}")]
    return f"write {' or '.join(full)} {value}".rstrip() if full else ""
