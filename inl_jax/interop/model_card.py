"""README.md of an exported model: what its run knows, and how to use it."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inl_jax.checks import one_line
from inl_jax.config import TrainConfig
from inl_jax.console import count, plural
from inl_jax.files import read_json
from inl_jax.model.language_model import param_count
from inl_jax.redact import redact
from inl_jax.text import hub
from inl_jax.training.metrics import Record, read_metrics

_VERSIONS = ("python", "inl_jax", "jax", "jaxlib", "flax")
_CARD = """---
{front}
---

# {title}

A language model of the architecture INL-LLM, the *integrator neuron layer* language model of the
project ARKITEKTURE_TRANSFORMER_ADL by pacific-prime777 (PyTorch, MIT licence). In every block a
context mixer brings in the earlier tokens; then the integrator refines each token by some
iterations of a damped, driven dynamical system, whose coefficients four small networks compute.
inl_jax, which wrote this, is an independent implementation in JAX; the `decay` and `attention`
contexts are its own.

{facts}

No licence is declared: the owner of the model adds a line `license:` at the top.

## Use

With transformers. The code of the model is in this directory, and runs once it is trusted:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "."  # this directory, or the model's name on the hub
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
inputs = tokenizer("Once upon", return_tensors="pt")
text = tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0])
```

A text becomes the same ids as in training: no token is added, and a special token that is spelled
in it is plain text. `{end}` ends a document; it is also the token to start and to pad with.

With inl_jax, from this directory:

```
inl import --weights . --out runs/imported
inl generate runs/imported --prompt "Once upon"
```
"""


def model_card(run_dir: Path, config: TrainConfig, *, step: int, dtype: str, end: str) -> str:
    """The text of README.md.

    Args:
      run_dir: the run, for its records and its environment.
      config: of the run.
      step: the saved step that is exported.
      dtype: of the exported weights.
      end: the end token.
    """
    from huggingface_hub import ModelCardData

    records = read_metrics(run_dir, up_to=step)
    front = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["inl", "inl-llm", "jax", config.model.context],
        datasets=_datasets(config) if records else None,
    )
    rows = [*_model(config, dtype), *_training(config, records, step), *_environment(run_dir)]
    cells = [f"| {label} | {one_line(value).replace('|', '&#124;')} |" for label, value in rows]
    return _CARD.format(
        front=front.to_yaml(),
        title=one_line(run_dir.resolve().name),
        facts="\n".join(["| | |", "|---|---|", *cells]),
        end=end,
    )


def _model(config: TrainConfig, dtype: str) -> Iterator[tuple[str, str]]:
    c = config.model
    n = param_count(c)
    yield "Parameters", f"{n:,} ({count(n)}), {dtype}"
    steps = plural(c.num_iterations, "iteration") if c.num_iterations else "no integrator"
    heads = f", {c.num_heads} heads, {c.num_kv_heads} of keys" if c.context == "attention" else ""
    yield (
        "Architecture",
        f"{plural(c.num_layers, 'layer')} of width {c.d_model:,}, {c.context} context{heads}, "
        f"{steps}, feed-forward width {c.d_ff:,}",
    )
    yield "Sequences", f"at most {plural(c.max_seq_len, 'token')}"
    yield "Vocabulary", f"{c.vocab_size:,} ids, tokenizer `{_shown(config.data.tokenizer)}`"


def _training(config: TrainConfig, records: list[Record], step: int) -> Iterator[tuple[str, str]]:
    if not records:
        yield "Training", f"not known: the run has no records up to update {step:,}"
        return
    yield "Data", ", ".join(f"`{_shown(path)}`" for path in config.data.paths)
    if config.init_from:
        yield "Began from", f"the weights of `{_shown(config.init_from)}`, whose data come on top"
    here: Record = {}
    for record in records:
        here |= record if record["step"] == step else {}
    trained = f"update {step:,}"
    if _finite(num_steps := here.get("num_steps")):
        trained += f" of {num_steps:,}"
    if _finite(tokens := here.get("tokens")):
        trained += f", {tokens:,} tokens"
    if _finite(epochs := here.get("epoch")):
        trained += f", {epochs:.2f} epochs"
    yield "Training", trained
    if not _finite(loss := here.get("validation_loss")):
        yield "Validation", "this update was not evaluated"
        return
    measured = f"loss {loss:.4f} nats per token"
    for key, what in (("perplexity", "perplexity"), ("bits_per_byte", "bits per byte")):
        if _finite(value := here.get(f"validation_{key}")):
            measured += f", {what} {value:.4g}"
    if _finite(tokens := here.get("validation_tokens")):
        measured += f", on {tokens:,} tokens held out"
    yield "Validation", measured


def _environment(run_dir: Path) -> Iterator[tuple[str, str]]:
    """A row for each place the run was started in, without names of machines and directories."""
    rows = {}
    starts = read_json(run_dir / "env.json").get("starts")
    for start in starts if isinstance(starts, list) else ():
        try:
            devices, versions = start["devices"], start["versions"]
            place = f"{devices['count']} x {devices['kind']}, {start['os']}"
            place += "".join(f", {name} {versions[name]}" for name in _VERSIONS if name in versions)
            if commit := start.get("git", {}).get("commit"):
                place += f" at commit {str(commit)[:12]}"
        except (KeyError, TypeError, AttributeError):  # damaged
            continue
        rows[place] = "Trained on", _shown(place)
    yield from rows.values()


def _datasets(config: TrainConfig) -> list[str] | None:
    """The paths that are datasets of the hub, by their names there."""
    names = [hub.parse(path) for path in config.data.paths if path.startswith("hf:")]
    return list(dict.fromkeys(found.name for found in names if not found.is_local())) or None


def _shown(name: str) -> str:
    """A path or a name without secrets; of an absolute path only its end, which names no user."""
    return redact(os.path.basename(name.rstrip("/")) if os.path.isabs(name) else name)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
