"""Trains a model, or resumes its run: inl train --config tiny.

Exit codes: 0 done; 1 failed; 2 a mistake in the input; 3 diverged; 12 out of memory; 28 the disk is
full; 110 stalled; 75 ended by SIGTERM or SIGHUP, or by Ctrl-C after it saved: the same command
resumes the run; 130 ended by Ctrl-C with nothing more to save. Several processes (docs/cluster.md)
all end with the same code.
"""

import gc
import os
import traceback
from collections.abc import Sequence

from inl_jax.config import InputError
from inl_jax.console import first_line, flush, say
from inl_jax.failures import (
    EXIT_CTRL_C,
    EXIT_DIVERGED,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_MISTAKE,
    Diverged,
    MachineFailure,
    OutOfMemory,
    is_out_of_memory,
)
from inl_jax.terminal import signals
from inl_jax.terminal.command_line import (
    Parser,
    add_launch_flags,
    from_command_line,
    join_processes,
)
from inl_jax.training.stop import Stopped

# The fields that most people need.
FIRST = """data.paths data.tokenizer run_dir num_steps num_epochs batch_size accumulate_steps
optim.learning_rate optim.schedule eval_every patience save_every sample_every sample_prompts track
mesh.fsdp""".split()


def main(argv: Sequence[str]) -> int:
    """The verb; returns the exit code, the same on every process."""
    parser = Parser("train", __doc__, add_help=False)
    parser.add_argument(
        "--dry_run", action="store_true", help="say what the run needs and stop; allocates nothing"
    )
    add_launch_flags(parser)
    config, flags = from_command_line(parser, argv, first=FIRST)
    # Imported late: a mistake on the command line is answered before JAX starts.
    from inl_jax.parallel import processes

    signals.unwind(patience=None)  # until `train` catches signals itself
    try:
        return processes.end(run(config, flags))
    except InputError as error:
        return processes.end(EXIT_MISTAKE, f"error: {error}")
    except processes.PeersMissing as error:
        return processes.end(EXIT_FAILED, f"error: {error}")
    except KeyboardInterrupt as stopped:  # before the first update, or a second Ctrl-C
        terminated = isinstance(stopped, Stopped)
        code = EXIT_INTERRUPTED if terminated else EXIT_CTRL_C
        what = "terminated" if terminated else "interrupted"
        signals.ignore()  # a second signal changes nothing
        processes.end(code, f"{what}; nothing more was saved")
        flush()
        os._exit(code)  # XLA may still compile in its threads: a slower exit would crash
    except Diverged as error:
        return processes.end(EXIT_DIVERGED, f"error: {error}")
    except MachineFailure as error:
        return processes.end(error.exit_code, f"error: {error}")
    except Exception as error:  # of several processes, also because another one died
        if is_out_of_memory(error):  # before `train` knows what the run needs
            line = f"error: out of memory: {first_line(error)}"
            return processes.end(OutOfMemory.exit_code, line)
        return processes.end(EXIT_FAILED, traceback.format_exc().rstrip())


def run(config, flags) -> int:
    """Trains; returns the exit code of this process."""
    gc.disable()
    from inl_jax.checklist import check_setup
    from inl_jax.curriculum import describe, make_curriculum
    from inl_jax.initial_weights import check_start
    from inl_jax.planning.preflight import plan_run
    from inl_jax.planning.programs.xla import apply_flags, use_compile_cache
    from inl_jax.trainer import train

    gc.freeze()  # modules stay: to look through them again and again would take 0.4 s of a start
    gc.enable()
    join_processes(flags)
    apply_flags(config.xla_flags)
    if flags.dry_run:
        check_setup(config)
        plan_run(config)
        check_start(config)
        for line in describe(make_curriculum(config, config.num_steps), config, config.num_steps):
            say(line)
        return 0
    use_compile_cache()
    return EXIT_INTERRUPTED if train(config).interrupted else 0
