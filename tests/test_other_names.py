import dataclasses
import re

import pytest

from inl_jax.config import InputError, TrainConfig
from inl_jax.config_file import load_config
from inl_jax.other_names import ANSWERS, answer_to

VALUES = {
    "N": "2",
    "F": "0.5",
    "B": "0.9",
    "RATE": "1e-3",
    "EPS": "1e-6",
    "NORM": "1",
    "DIR": "runs/x",
    "RUN_DIR": "runs/x",
    "PATH": "text.txt",
    "PHASES": "1:1",
    "NAME": "bytes",
    "TRACKER": "wandb",
    "NATS": "0.01",
    "TEXT": "The",
}
ASKED = """lr learning_rate epochs num_train_epochs max_steps max_iters steps resume
resume_from_checkpoint output_dir out_dir report_to gradient_accumulation_steps
per_device_train_batch_size micro_batch_size dataset data_path train_file block_size max_seq_length
context_length n_layer num_hidden_layers n_embd hidden_size n_head dtype bf16 fp16 precision
mixed_precision gradient_checkpointing weight_decay warmup_steps warmup_iters grad_clip
max_grad_norm eval_interval eval_steps log_interval logging_steps save_steps save_interval
save_total_limit beta1 beta2 adam_beta1 adam_beta2 wandb wandb_project wandb_run_name tensorboard
logger early_stopping_patience early_stopping_threshold lr_scheduler_type lr_schedule scheduler
sample_prompt prompts model_name_or_path deepspeed fsdp
seq_len""".split()


def sections():
    config = TrainConfig()
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if dataclasses.is_dataclass(getattr(config, field.name))
    }


def leaves():
    return sorted({f.name for section in sections().values() for f in dataclasses.fields(section)})


def test_no_answer_hides_a_field_of_ours():
    ours = {field.name for field in dataclasses.fields(TrainConfig)} - set(sections())
    assert not ours & set(ANSWERS)


@pytest.mark.parametrize("name", ASKED)
def test_usual_names_of_other_programs_are_answered_in_one_line(inl, name):
    for spelled in {name, name.replace("_", "-")}:
        for argv in ([f"--{spelled}", "2"], [f"--{spelled}=2"], [f"--{spelled}"]):
            code, out, err = inl("train", "--config", "tiny", *argv)
            assert code == 2 and out == "" and err.count("\n") == 1, argv
            assert err.startswith(f"error: --{name}: {answer_to(name)[:9]}")


def flags_in(answer):
    """Each flag that an answer tells to write, with its value; an example value for a word."""
    told = answer.split(";")[0].split(", the")[0]
    value = r"[A-Z_]+\b|bfloat16|block|optimizer|cosine|wandb|tensorboard|0"
    found = re.findall(rf"(--[a-z_0-9]+[.\w]*)(?: ({value}))?", told)
    return [(flag, VALUES.get(value, value)) for flag, value in found]


@pytest.mark.parametrize("name", ANSWERS)
def test_what_an_answer_says_to_write_is_accepted(name):
    answer = answer_to(name)
    if not answer.startswith("write"):
        assert re.search("--run_dir|JAX_PLATFORMS", answer)
        return
    written = [(flag, value) for flag, value in flags_in(answer) if flag != "--config"]
    assert written and all(value for _, value in written), answer
    fitting = {"--num_steps": "200", "--model.d_model": "64"}  # above the warmup; even heads
    values = {flag: fitting.get(flag, v) if v == "2" else v for flag, v in written}
    config = load_config("tiny", [word for pair in values.items() for word in pair])
    for flag, value in values.items():
        section, _, field = flag[2:].rpartition(".")
        found = getattr(getattr(config, section) if section else config, field)
        as_text = " ".join(map(str, found)) if isinstance(found, tuple) else str(found)
        assert as_text == value or found == float(value), flag


@pytest.mark.parametrize("name", leaves())
def test_name_of_a_field_without_its_section_is_answered_with_all_of_it(name):
    owners = [s for s, section in sections().items() if hasattr(section, name)]
    if name in ANSWERS:
        return
    assert answer_to(name, "7") == f"write {' or '.join(f'--{s}.{name}' for s in owners)} 7"


def test_value_that_was_given_is_in_the_answer(inl):
    _, _, err = inl("train", "--config", "tiny", "--lr", "3e-4")
    assert err == "error: --lr: write --optim.learning_rate 3e-4\n"
    _, _, err = inl("prepare", "--config", "tiny", "--block-size=256")
    assert "--data.seq_len 256" in err and "--model.max_seq_len 256" in err
    _, _, err = inl("estimate", "--config", "tiny", "--seq_len", "64")
    assert err == "error: --seq_len: write --data.seq_len 64\n"


@pytest.mark.parametrize("spelled", [["lr=3e-4"], ["--lr=3e-4"], ["--lr", "3e-4"]])
def test_python_gets_the_same_answers(spelled):
    with pytest.raises(InputError, match="^--lr: write --optim.learning_rate 3e-4$"):
        load_config("tiny", ["seed=1", *spelled])


def test_flags_of_the_verb_itself_are_not_answered(inl):
    code, _, err = inl("estimate", "--config", "tiny", "--device", "none")
    assert code == 2 and "choose one of" in err
