"""What a run is: frozen dataclasses and their checks.

Every mistake is an `InputError` of one line that names the field, the value found and what to do.
`config_file.py` reads and writes configs as text.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from inl_jax.checks import (
    InputError,
    check_types,
    require,
    require_at_most,
    require_not_negative,
    require_positive,
    shown,
)
from inl_jax.data_config import DataConfig
from inl_jax.files import user_path
from inl_jax.model_config import ModelConfig
from inl_jax.phase import Phase

__all__ = [
    "DataConfig",
    "InputError",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "Phase",
    "TrainConfig",
    "field_types",
    "with_fields",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its learning rate, counted in optimizer updates."""

    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """adafactor keeps no first moments, and second moments only of rows and columns."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage type of the moments. bfloat16 is rounded stochastically."""
    rounding: Literal["masters", "stochastic"] = "masters"
    """How updates reach bfloat16 parameters: through float32 master weights in the optimizer, or by
    rounding each new weight up or down at random, without bias, which needs no memory."""
    accumulator_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage type of the mean gradient over micro-batches. bfloat16 is rounded stochastically."""
    state_memory: Literal["device", "pinned_host"] = "device"
    """Where masters and moments are stored. pinned_host: in host memory; they pass through the
    device one layer at a time."""
    learning_rate: float = 1e-3
    """Peak learning rate, reached at the end of the warmup."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """The learning rate after the warmup. cosine: falls to the end of the run. wsd (warmup, stable,
    decay): stays at the peak, then falls over the last decay_fraction of the run; a run that is
    prolonged rises to the peak again. constant: stays at the peak."""
    decay_fraction: float = 0.2
    """Share of the updates over which wsd falls."""
    warmup_steps: int = 100
    """Updates of linear warmup. The first one has 1 / warmup_steps of the peak."""
    final_lr_fraction: float = 0.1
    """Learning rate of the last update, as a fraction of the peak; not for constant."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay of kernels and the embedding. Nothing else is decayed."""
    clip_norm: float = 1.0
    """Gradients with a larger global norm are scaled down to this norm."""
    skip_spikes: float = 0.0
    """An update whose gradient norm exceeds this multiple of the median of the last 128 accepted
    updates is skipped, as one that is not finite; 0 skips none. The first 16 are never skipped, nor
    are more than 8 in a row: then the level has changed, and the norms are collected anew."""

    def __post_init__(self):
        check_types(self, "optim.")
        require_positive(self, "optim.", "learning_rate eps clip_norm")
        require_at_most(self, "optim.", 1e30, "learning_rate eps weight_decay")
        require(self.eps >= 1e-30, f"optim.eps={self.eps}: must be at least 1e-30, for float32")
        require_not_negative(self, "optim.", "warmup_steps weight_decay")
        require(
            self.skip_spikes == 0 or 1 < self.skip_spikes < 3e38,
            f"optim.skip_spikes={self.skip_spikes}: a multiple of the median, such as 10, or 0",
        )
        for name in ("b1", "b2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optim.{name}={value}: must be at least 0, below 1")
        require(
            0 <= self.final_lr_fraction <= 1,
            f"optim.final_lr_fraction={self.final_lr_fraction}: must lie between 0 and 1",
        )
        require(
            0 < self.decay_fraction <= 1,
            f"optim.decay_fraction={self.decay_fraction}: must be above 0 and at most 1",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; their product is the number of devices."""

    data: int | Literal["rest"] = "rest"
    """Replicas, each with its own rows of a batch. rest: the devices that the other axes leave."""
    fsdp: int | Literal["rest"] = 1
    """Devices that parameters, optimizer state and the rows of a batch are sharded over."""
    tensor: int | Literal["rest"] = 1
    """Devices that share the feed-forward, the attention heads, the integrator's channels and the
    vocabulary."""
    fsdp_shards: Literal["all", "optimizer"] = "all"
    """What is sharded over fsdp. all: parameters, gradients and optimizer state (ZeRO-3).
    optimizer: gradients and optimizer state; each device holds all parameters (ZeRO-2)."""

    def __post_init__(self):
        check_types(self, "mesh.")
        sizes = {name: getattr(self, name) for name in ("data", "fsdp", "tensor")}
        for name, size in sizes.items():
            require(
                size == "rest" or 0 < size <= 10**6,
                f"mesh.{name}={shown(size)}: a positive whole number up to 1,000,000, or rest",
            )
        rest = [f"mesh.{name}" for name, size in sizes.items() if size == "rest"]
        require(len(rest) < 2, f"{' and '.join(rest)} are both rest: give one of them a number")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run. Every step of it is an optimizer update."""

    name: str = "custom"
    """Name of the run, shown beside the true parameter count."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    run_dir: str = "runs/custom"
    """Directory of the run: config, checkpoints, metrics. Starting again resumes from it."""
    init_from: str = ""
    """What gives this run its first weights, and nothing else: a run directory, an exported model's
    directory, or a published .pt file. Empty: random weights."""
    seed: int = 0
    """Decides the initial weights, the order of the data and dropout."""
    num_steps: int = 1000
    """Updates in the run; 0 if num_epochs decides."""
    num_epochs: float = 0.0
    """Passes over the training tokens; 0 if num_steps decides."""
    batch_size: int = 16
    """Sequences of an update, over all devices and micro-batches."""
    accumulate_steps: int | Literal["auto"] = 1
    """Micro-batches of an update. More of them need less memory and give the same mean gradient. If
    a micro-batch has fewer rows than there are devices, fewer micro-batches are made. auto: the
    fastest number that fits the device's memory, chosen and said at the start (docs/memory.md). It
    divides the rows of each device, so a power of 2 as batch_size leaves most choice."""
    loss_chunk: int | Literal["auto"] = "auto"
    """Tokens of one device whose logits exist at once, in training and evaluation; 0 takes all.
    auto: 256 on a CPU, more if the vocabulary is small; 2048 on other devices, fewer if it is
    large. The loss does not depend on it."""
    log_every: int = 10
    """Updates between records of the training loss."""
    eval_every: int = 250
    """Updates between evaluations; 0 evaluates only at the end."""
    eval_sequences: int = 256
    """Validation sequences of an evaluation, always the same ones; 0 takes the whole split."""
    save_every: int = 250
    """Updates between checkpoints; 0: none. The best evaluation and the last update are always
    saved."""
    keep_last: int = 2
    """Newest checkpoints that are kept, beside the best by validation loss."""
    patience: int = 0
    """The run stops early after so many evaluations in a row without an improvement; 0 never."""
    min_delta: float = 0.0
    """An evaluation improves if its loss is lower than the best by more than this, in nats."""
    sample_every: int = 0
    """Updates between samples; 0 makes none."""
    sample_prompts: tuple[str, ...] = ("The",)
    """Prompts that are continued each time, by the likeliest tokens and by drawn ones."""
    sample_tokens: int = 64
    """New tokens of a sample."""
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers that also receive the records; each needs the extra of its name."""
    project: str = "inl_jax"
    """Project of the run in wandb and trackio."""
    max_nonfinite_steps: int = 10
    """The run ends after so many updates in a row with a loss or gradient that is not finite."""
    stall_factor: float = 20.0
    """A wait of more than 60 s and more than this multiple of the usual update is said on stderr,
    with what is waited for and the stacks of all threads; 0 says nothing. Evaluations, saves and
    samples are compared with those before. The first of each and the first update may take 30
    minutes, but for the wait for its input."""
    stall_limit: float = 1800.0
    """Seconds without any progress after which the run ends with exit code 110, but not before
    twice the usual time; 0 never. It saves first if it waits for input."""
    xla_flags: tuple[str, ...] = ()
    """Flags of the XLA compiler that `inl train` adds to XLA_FLAGS, as in
    --xla_flags='--xla_a=1 --xla_b=2'. A flag that this version of XLA does not know is left out
    with a warning."""

    def __post_init__(self):
        check_types(self, "")
        require_positive(
            self,
            "",
            "batch_size accumulate_steps log_every keep_last sample_tokens max_nonfinite_steps",
        )
        require_not_negative(
            self,
            "",
            "loss_chunk num_steps num_epochs eval_every eval_sequences save_every patience "
            "min_delta sample_every seed stall_factor stall_limit",
        )
        require_at_most(self, "", 2**32 - 1, "seed")
        require_at_most(self, "", 10**8, "num_steps num_epochs")
        require_at_most(self, "", 10**6, "batch_size")
        require_at_most(
            self,
            "",
            2**31 - 1,
            "loss_chunk log_every eval_every eval_sequences save_every keep_last patience "
            "sample_every sample_tokens max_nonfinite_steps",
        )
        require(
            (self.num_steps > 0) != (self.num_epochs > 0),
            f"num_steps={self.num_steps} with num_epochs={self.num_epochs}: exactly one must be "
            "positive; set the other to 0, as in --num_epochs 2 --num_steps 0",
        )
        require(
            self.num_epochs == 0 or not self.data.phases,
            f"num_epochs={self.num_epochs} with data.phases: each source has epochs of its own; "
            "count the run in updates, as in --num_steps 1000 --num_epochs 0",
        )
        require(
            self.num_steps == 0 or self.optim.warmup_steps < self.num_steps,
            f"optim.warmup_steps={self.optim.warmup_steps}: must be below "
            f"num_steps={self.num_steps}; add --optim.warmup_steps "
            f"{self.num_steps // 10}",
        )
        require(
            self.accumulate_steps == "auto" or self.batch_size % self.accumulate_steps == 0,
            f"batch_size={self.batch_size}: must be a multiple of "
            f"accumulate_steps={self.accumulate_steps}",
        )
        require(
            self.data.seq_len <= self.model.max_seq_len,
            f"data.seq_len={self.data.seq_len}: must not exceed "
            f"model.max_seq_len={self.model.max_seq_len}",
        )
        require(
            self.model.tol == 0,
            f"model.tol={self.model.tol}: training takes all iterations of every token; leave it "
            "0, and give --tol to inl evaluate or inl generate",
        )
        require(
            self.optim.rounding == "masters" or self.model.param_dtype == "bfloat16",
            f"optim.rounding={self.optim.rounding}: only for model.param_dtype=bfloat16, which is "
            f"{self.model.param_dtype}",
        )
        require(
            self.patience == 0 or self.eval_every > 0,
            f"patience={self.patience} with eval_every=0: nothing is evaluated before the end; set "
            "eval_every, or patience 0",
        )
        require(
            self.patience == 0 or self.data.validation_fraction > 0,
            f"patience={self.patience} with data.validation_fraction=0: there is no text to "
            "evaluate on; raise it, or set patience 0",
        )
        require(self.min_delta < float("inf"), f"min_delta={self.min_delta}: must be finite")
        require(
            self.sample_every == 0 or len(self.sample_prompts) > 0,
            f"sample_every={self.sample_every} with no sample_prompts: name some, or set "
            "sample_every 0",
        )
        for name in ("run_dir", "init_from"):
            if getattr(self, name) or name == "run_dir":
                path = str(user_path(getattr(self, name), name))
                object.__setattr__(self, name, path)  # as `check_types` does
        for flag in " ".join(self.xla_flags).split():
            require(
                flag.startswith("--xla_"),
                f"xla_flags={' '.join(self.xla_flags)}: {flag} must look like --xla_name=value; "
                "write --xla_flags='--xla_name=value'",
            )


def field_types() -> dict[str, Any]:
    """The type of each field that a command line can set, by its dotted name."""
    found = {}
    for field in dataclasses.fields(TrainConfig):
        if dataclasses.is_dataclass(field.type):
            inner = dataclasses.fields(field.type)
            found |= {f"{field.name}.{one.name}": one.type for one in inner}
        else:
            found[field.name] = field.type
    return found


def with_fields(config: TrainConfig, fields: Mapping[str, Any]) -> TrainConfig:
    """`config` with dotted fields replaced, all at once: `{"model.remat": "block", "seed": 1}`.

    Raises:
      InputError: the new values are impossible, each alone or together.
    """
    sections: dict[str, dict[str, Any]] = {}
    for name, value in fields.items():
        section, _, field = name.rpartition(".")
        sections.setdefault(section, {})[field] = value
    changes = sections.pop("", {})
    for section, values in sections.items():
        changes[section] = dataclasses.replace(getattr(config, section), **values)
    return dataclasses.replace(config, **changes)
