"""What do trackers, GPU use, samples and the integrator's dynamics cost a step, and change in it?

python benchmarks/watching.py --config tiny [--track tensorboard wandb trackio] [--json]

Trains the config by turns without and with all of it, from the beginning each time, and compares
the seconds per update of the records and the parameters at the end. W&B runs offline. On CPUs the
trackers, which are processes, take their start from the same cores that train.
"""

import dataclasses
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence

import jax
from harness import PAUSE, Report, config_and_flags, main, number, ratios

from inl_jax.config import TrainConfig
from inl_jax.terminal.command_line import Parser
from inl_jax.trainer import train


def watching(parser: Parser, argv: Sequence[str]) -> Report:
    number(parser, "--rounds", 5, "runs of each")
    number(parser, "--updates", 300, "updates of a run")
    config, flags = config_and_flags(parser, argv)
    names = config.track or ("tensorboard", "wandb", "trackio")
    plain = dataclasses.replace(config, track=(), sample_every=0, num_steps=flags.updates)
    every = flags.updates // 3
    plain = dataclasses.replace(plain, eval_every=every, save_every=0, num_epochs=0)
    watched = dataclasses.replace(plain, track=names, sample_every=every)
    seconds, digests = {"plain": [], "watched": []}, set()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"WANDB_MODE": "offline", "TRACKIO_DIR": f"{folder}/trackio"}
        for i in range(flags.rounds + 1):  # the first round compiles and does not count
            for name, run in {"plain": plain, "watched": watched}.items():
                time.sleep(PAUSE)
                median, digest = trained(run, f"{folder}/{name}-{i}")
                digests.add(digest)
                seconds[name] += [median] if i else []
    median, low, high = ratios(seconds["watched"], seconds["plain"])
    used = resource.getrusage(resource.RUSAGE_CHILDREN)  # of the trackers, which have ended
    record = {
        "step_time_ratio": median,
        "from": low,
        "to": high,
        "plain_ms": 1000 * statistics.median(seconds["plain"]),
        "tracker_cpu_seconds_a_run": (used.ru_utime + used.ru_stime) / (flags.rounds + 1),
        "same_bits": int(len(digests) == 1),
    }
    return Report(record, [], [f"{flags.rounds} runs of each of {flags.updates} updates"])


def trained(config: TrainConfig, run_dir: str) -> tuple[float, int]:
    """Seconds per update, median over the records of a run, and a digest of its parameters."""
    result = train(dataclasses.replace(config, run_dir=run_dir))
    times = [record["seconds_per_step"] for record in result.history if "loss" in record]
    leaves = jax.tree.leaves(jax.device_get(result.params))
    return statistics.median(times), hash(b"".join(leaf.tobytes() for leaf in leaves))


if __name__ == "__main__":
    main(watching)
