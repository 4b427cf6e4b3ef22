"""README.md of an exported model: what its run knows, and how to use it."""

import math
import os
import re
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
inl_jax, which wrote this, is an independent implementation in JAX; the `decay`, `gated` and
`attention` contexts are its own.

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
in it is plain text. {end} ends a document; it is also the token to start and to pad with.

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
        tags=["inl", "inl-llm", "jax", *dict.fromkeys(config.model.mixers)],
        datasets=_datasets(config) if records else None,
    )
    rows = [*_model(config, dtype), *_training(config, records, step), *_environment(run_dir)]
    cells = [(label, one_line(value).replace("|", r"\|")) for label, value in rows]
    return _CARD.format(
        front=front.to_yaml(),
        title=_escaped(run_dir.resolve().name),
        facts="\n".join(
            ["| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in cells)]
        ),
        end=_code(end),
    )


def _model(config: TrainConfig, dtype: str) -> Iterator[tuple[str, str]]:
    c = config.model
    n = param_count(c)
    yield "Parameters", f"{n:,} ({count(n)}), {dtype}"
    steps = plural(c.num_iterations, "iteration") if c.num_iterations else "no integrator"
    heads = f", {c.num_heads} heads, {c.num_kv_heads} of keys" if c.uses_attention else ""
    yield (
        "Architecture",
        f"{plural(c.num_layers, 'layer')} of width {c.d_model:,}, {c.context_text}{heads}, "
        f"{steps}, feed-forward width {c.d_ff:,}",
    )
    yield "Sequences", f"at most {plural(c.max_seq_len, 'token')}"
    tokenizer = config.data.tokenizer
    if tokenizer.startswith(("/", ".", "~")):  # else it may be a name on the hub
        tokenizer = _last_part(tokenizer)
    yield "Vocabulary", f"{c.vocab_size:,} ids, tokenizer {_code(tokenizer)}"


def _training(config: TrainConfig, records: list[Record], step: int) -> Iterator[tuple[str, str]]:
    if not records:
        yield "Training", f"not known: the run has no records up to update {step:,}"
        return
    yield "Data", ", ".join(_code(_source(path)) for path in config.data.paths)
    if config.init_from:
        weights = _code(_last_part(config.init_from))
        yield "Began from", f"the weights of {weights}, whose data come on top"
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
        rows[place] = "Trained on", redact(place)
    yield from rows.values()


def _datasets(config: TrainConfig) -> list[str] | None:
    """The paths that are datasets of the hub, by their names there."""
    names = [hub.parse(path) for path in config.data.paths if path.startswith("hf:")]
    return list(dict.fromkeys(found.name for found in names if not found.is_local())) or None


def _source(path: str) -> str:
    """An entry of `data.paths`: a dataset of the hub in full, of a path only its end."""
    on_hub = path.startswith("hf:") and not hub.parse(path).is_local()
    return path if on_hub else _last_part(path)


def _last_part(path: str) -> str:
    """The end of a path without secrets; what comes before may name a user."""
    return os.path.basename(redact(path).rstrip("/"))


def _code(text: str) -> str:
    """Markdown that shows `text`, without secrets, as it is; backticks in it too."""
    text = redact(text)
    runs = {len(run) for run in re.findall("`+", text)}
    fence = "`" * min(n for n in range(1, len(runs) + 2) if n not in runs)
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def _escaped(text: str) -> str:
    """Markdown that shows `text`, without secrets, on one line as plain text."""
    return re.sub(r"([\\`*\[\]<&])", r"\\\1", one_line(redact(text)))


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
