"""Trains variants of one config, for studies that compare where they end."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from inl_jax.config import TrainConfig, with_fields
from inl_jax.config_file import load_config
from inl_jax.terminal.command_line import Parser
from inl_jax.trainer import train
from inl_jax.training.metrics import Record


class Trained(NamedTuple):
    """A variant and the records of its run."""

    config: TrainConfig
    history: list[Record]


def study_flags(parser: Parser, argv: Sequence[str] | None, *, runs_dir: str) -> argparse.Namespace:
    """The study's own flags, and those that `train_variants` reads."""
    parser.add_argument("--config", default="tiny", help="the config to vary; tiny by default")
    parser.add_argument("--num_steps", type=int, default=1000, help="updates; 1000 by default")
    parser.add_argument("--runs_dir", default=runs_dir, help=f"for all runs; {runs_dir} by default")
    parser.add_argument("overrides", nargs="*", help="section.field=value, for every run")
    parser.add_argument("-h", "--help", action="help", help="show this")
    return parser.parse_flags(sys.argv[1:] if argv is None else argv)


def train_variants(
    flags: argparse.Namespace, variants: Mapping[str, Mapping[str, Any]]
) -> list[Trained]:
    """Trains each variant in a directory of its own. Runs that exist are resumed or read.

    Args:
      flags: from `study_flags`; their overrides have priority over the fields of a variant.
      variants: dotted fields of the config, by the name of the directory below --runs_dir.

    Raises:
      InputError: before any training, one of the configs is impossible.
    """
    given = [f"num_steps={flags.num_steps}", "eval_sequences=0", "sample_every=0"]
    base = load_config(flags.config, [*given, *flags.overrides])
    overridden = {override.partition("=")[0] for override in flags.overrides}
    configs = []
    for name, fields in variants.items():
        fields = {"run_dir": f"{flags.runs_dir}/{name}", **fields}
        own = {field: value for field, value in fields.items() if field not in overridden}
        configs.append(with_fields(base, own))
    return [Trained(config, train(config).history) for config in configs]


def validations(history: Sequence[Record]) -> list[Record]:
    """The records of evaluations, in order of updates."""
    return [record for record in history if "validation_loss" in record]
