"""The numbers of a run that a report puts first."""

import math
from datetime import datetime
from typing import Any, Literal, NamedTuple

import numpy as np

from inl_jax.config import InputError
from inl_jax.console import count, duration
from inl_jax.planning.hardware import gpu_of
from inl_jax.report.run import Run
from inl_jax.storage.run_dir import read_config
from inl_jax.training.metrics import Record

AIMS = {"text": 20, "code": 10}  # perplexities that the training guide aims at
UNKNOWN = "not known"
_TONES = {"good": "good", "watch it": "watch", "over-fitting": "bad"}


class Fact(NamedTuple):
    """One number of a run, with what explains it."""

    label: str
    value: str
    more: str = ""
    tone: Literal["", "good", "watch", "bad"] = ""


def facts(run: Run) -> list[Fact]:
    """What was reached, for how much: the same labels for every run."""
    return [
        *_validation(run),
        _best(run),
        _gap(run),
        _tokens(run),
        _speed(run),
        _time(run),
        _price(run),
        _energy(run),
    ]


def architecture(run: Run) -> str:
    """The true number of parameters, and how the layers read the earlier tokens."""
    from inl_jax.model.language_model import param_count  # late: starts JAX

    try:
        model = read_config(run.run_dir).model
    except InputError:  # no config, or one of another version
        return "number of parameters not known"
    n = param_count(model)
    return f"{n:,} parameters ({count(n)}), {model.context_text}"


def best_evaluation(run: Run) -> Record | None:
    """The evaluation with the lowest loss; None if none has a finite one.

    Evaluations of another validation text than the latest one are left out.
    """
    basis = run.latest("basis")
    found = [
        record
        for record in run.records
        if _finite(record.get("validation_loss")) and record.get("basis") == basis
    ]
    return min(found, key=lambda record: record["validation_loss"], default=None)


def bytes_per_token(run: Run) -> float | None:
    """Bytes of validation text that a token stands for on average; None if not known."""
    best = best_evaluation(run) or {}
    bits = best.get("validation_bits_per_byte")
    if not _finite(bits) or bits <= 0:
        return None
    return best["validation_loss"] / math.log(2) / bits


def _validation(run: Run) -> list[Fact]:
    last = next((r for r in reversed(run.records) if "validation_loss" in r), None)
    if last is None:
        return [
            Fact("Validation loss", UNKNOWN, "no evaluation yet"),
            Fact("Bits per byte", UNKNOWN),
        ]
    perplexity = number(last.get("validation_perplexity"), ",.2f")
    text = bytes_per_token(run)
    return [
        Fact(
            "Validation loss",
            number(last["validation_loss"], ".4f"),
            f"perplexity {perplexity} at update {last['step']:,}",
        ),
        Fact(
            "Bits per byte",
            number(last.get("validation_bits_per_byte"), ".4f"),
            f"{text:.2f} bytes per token" if text else "",
        ),
    ]


def _best(run: Run) -> Fact:
    best = best_evaluation(run)
    if best is None:
        return Fact("Best update", UNKNOWN)
    kept = run.best.get("step")
    if kept is None:
        where = "no checkpoint of it noted"
    elif kept == best["step"]:
        where = "its checkpoint is kept"
    else:
        where = f"best checkpoint: update {kept:,}"
    return Fact("Best update", f"{best['step']:,}", f"loss {best['validation_loss']:.4f}; {where}")


def _gap(run: Run) -> Fact:
    verdict, gap = run.latest("verdict"), run.latest("gap")
    if verdict is None or not _finite(gap):
        return Fact("Over-fitting", UNKNOWN, "no gap recorded")
    more = f"validation less training loss {gap:+.3f}"
    return Fact("Over-fitting", verdict, more, _TONES.get(verdict, ""))


def _tokens(run: Run) -> Fact:
    last = run.records[-1]
    tokens = run.positions(np.array([last["step"]])).get("tokens")
    more = f"update {last['step']:,}"
    if (num_steps := last.get("num_steps")) is not None:
        more += f" of {num_steps:,}"
    if run.latest("patience_left") == 0:
        more += ", stopped early"
    if (epoch := run.latest("epoch")) is not None:
        more += f", {epoch:.2f} epochs"
    if skipped := run.latest("skipped"):
        more += f", {skipped:,} skipped"
    return Fact("Trained tokens", UNKNOWN if tokens is None else count(tokens[0]), more)


def _speed(run: Run) -> Fact:
    rates = run.curve("tokens_per_second")[1]
    if not np.isfinite(rates).any():
        return Fact("Speed", UNKNOWN)
    more, mfu = "tokens per second, median", run.curve("mfu")[1]
    if np.isfinite(mfu).any():
        more += f"; MFU {100 * np.nanmedian(mfu):.1f}%"
    return Fact("Speed", count(np.nanmedian(rates)), more)


def _time(run: Run) -> Fact:
    elapsed = run.latest("elapsed")
    if elapsed is None:
        return Fact("Time", UNKNOWN, "not recorded")
    return Fact("Time", duration(elapsed), "of training, all starts together")


def _price(run: Run) -> Fact:
    """The rent of the GPUs that each stretch of training ran on."""
    starts = [
        (datetime.fromisoformat(start["time"]).timestamp(), start["devices"])
        for start in run.environment.get("starts", ())
    ]
    timed = [r for r in run.records if r.get("elapsed") is not None and "time" in r]
    if not starts or not timed:
        return Fact("Price", UNKNOWN, "time or devices not recorded")
    total = before = 0.0
    rates = {}
    for record in timed:
        since = [devices for start, devices in starts if start <= record["time"]]
        devices = since[-1] if since else starts[0][1]
        gpu = gpu_of(devices["kind"])
        if gpu is None or gpu.price is None:
            return Fact("Price", UNKNOWN, f"no price for {devices['kind']}")
        hours = (record["elapsed"] - before) / 3600
        total, before = total + hours * gpu.price * devices["count"], record["elapsed"]
        rate = f"{devices['count']} x {gpu.name} at {gpu.price:.2f} USD an hour"
        rates[rate] = f"{rate} ({gpu.price_source})"
    return Fact("Price", f"{total:,.2f} USD", "; ".join(rates.values()))


def _energy(run: Run) -> Fact:
    energy = run.latest("energy_kwh")
    if energy is None:
        return Fact("Energy", UNKNOWN, "the GPUs' power was not recorded")
    return Fact("Energy", f"{energy:,.3g} kWh", "as the GPUs of process 0 report it")


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def number(value: float | None, form: str) -> str:
    """A number as text, if it is one."""
    return format(value, form) if _finite(value) else "not finite"
