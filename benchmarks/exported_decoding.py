"""Is the time of a token flat in position, in the exported PyTorch model too?

python benchmarks/exported_decoding.py --config C [--section.field value ...] [--json]

A row is one context mixer: seconds of a token after few and after many tokens, random weights.
"""

import statistics
import time
from collections.abc import Sequence

import torch
import transformers
from harness import Report, config_and_flags, main, number

from inl_jax.interop.exported.configuration_inl import InlConfig
from inl_jax.interop.exported.modeling_inl import InlForCausalLM
from inl_jax.interop.exported_config import to_json_fields
from inl_jax.terminal.command_line import Parser


def exported_decoding(parser: Parser, argv: Sequence[str]) -> Report:
    parser.add_argument("--contexts", nargs="+", default=["decay", "attention"])
    parser.add_argument("--positions", type=int, nargs=2, default=[100, 4000])
    number(parser, "--new_tokens", 32, "tokens to decode after each prompt")
    number(parser, "--rounds", 3, "measurements of each")
    config, flags = config_and_flags(parser, argv)
    rows = []
    for context in flags.contexts:
        torch.manual_seed(config.seed)
        fields = to_json_fields(config.model) | {"context": context}
        model = InlForCausalLM(InlConfig(**fields)).eval()
        near, far = decoding(model, flags.positions, flags.new_tokens, flags.rounds)
        times = {f"ms_at_{p}": 1e3 * s for p, s in zip(flags.positions, (near, far), strict=True)}
        rows.append({"context": context} | times | {"ratio": far / near})
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return Report({}, rows, [f"{config.name}, random weights, batch size 1, float32, {versions}"])


@torch.no_grad()
def decoding(
    model: InlForCausalLM, positions: Sequence[int], new_tokens: int, rounds: int
) -> list[float]:
    """Seconds of a token from each position on: medians, the positions taken in turns."""
    token = torch.zeros(1, 1, dtype=torch.long)
    caches = {p: model(token.expand(1, p), use_cache=True, logits_to_keep=1)[1] for p in positions}
    seconds = {position: [] for position in positions}
    for _ in range(rounds):
        for position, cache in caches.items():
            for _ in range(new_tokens):
                start = time.perf_counter()
                model(token, past_key_values=cache)
                seconds[position].append(time.perf_counter() - start)
    return [statistics.median(seconds[position]) for position in positions]


if __name__ == "__main__":
    main(exported_decoding)
