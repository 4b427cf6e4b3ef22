"""Generation checks: the same prompts, continued in the same way at every check."""

import re
from collections.abc import Sequence
from pathlib import Path

from inl_jax.files import write_text
from inl_jax.sampling import LanguageModel

TEMPERATURE = 0.8
SEED = 0  # one for all updates, so that samples differ by what was learned


def make_samples(
    model: LanguageModel, prompts: Sequence[str], *, max_new_tokens: int
) -> list[dict[str, str]]:
    """For each prompt its continuation by the likeliest tokens, and by drawn ones."""
    greedy = model.generate(prompts, max_new_tokens=max_new_tokens)
    sampled = model.generate(
        prompts, max_new_tokens=max_new_tokens, temperature=TEMPERATURE, seed=SEED
    )
    return [
        {"prompt": prompt, "greedy": likeliest, "sampled": drawn}
        for prompt, likeliest, drawn in zip(prompts, greedy, sampled, strict=True)
    ]


def write_samples(run_dir: str | Path, step: int, samples: Sequence[dict[str, str]]) -> Path:
    """Writes what `make_samples` gave to RUN/samples/000500.md, and returns the path."""
    path = Path(run_dir) / "samples" / f"{step:06}.md"
    path.parent.mkdir(exist_ok=True)
    parts = [f"# Samples at update {step}\n"]
    for sample in samples:
        parts.append(f"## Prompt\n\n{_fenced(sample['prompt'])}\n")
        parts.append(f"Likeliest tokens:\n\n{_fenced(sample['prompt'] + sample['greedy'])}\n")
        drawn = f"Drawn at temperature {TEMPERATURE}, seed {SEED}"
        parts.append(f"{drawn}:\n\n{_fenced(sample['prompt'] + sample['sampled'])}\n")
    write_text(path, "\n".join(parts))
    return path


def _fenced(text: str) -> str:
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"
