"""Trains a model, or goes on with a run: python scripts/train.py --config configs/tiny.py.

Exit codes: 0 done; 1 failed; 2 a mistake in the input; 3 diverged; 75 stopped by SIGTERM, or by
Ctrl-C after saving: the same command goes on; 130 stopped by Ctrl-C with nothing more to save.
Several processes (docs/cluster.md) all end with the same code.
"""

import argparse
import os
import signal
import sys
import traceback

from inl_jax.cli.command_line import from_command_line
from inl_jax.config import InputError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, add_help=False)
    parser.add_argument(
        "--dry_run", action="store_true", help="say what the run needs and stop, allocating nothing"
    )
    parser.add_argument("--coordinator", default="", help="host:port of process 0, of several")
    parser.add_argument("--num_processes", type=int, help="how many; 1 ignores any launcher")
    parser.add_argument("--process_id", type=int, help="which one this is, from 0")
    parser.add_argument(
        "--start_timeout", type=int, default=300, help="seconds for the processes to come together"
    )
    parser.add_argument(
        "--peer_timeout",
        type=int,
        default=60,
        help="seconds without a sign of life after which a process counts as dead, and all end",
    )
    config, flags = from_command_line(parser)
    # Imported late: a mistake on the command line is answered before JAX starts.
    from inl_jax.parallel import processes
    from inl_jax.trainer import Diverged
    from inl_jax.training.stop import EXIT_DIVERGED, EXIT_INTERRUPTED, Stopped

    def stop(number, frame):
        raise Stopped

    signal.signal(signal.SIGTERM, stop)  # until `train` looks out for it
    try:
        return processes.end(run(config, flags))
    except InputError as error:
        return processes.end(2, f"error: {error}")
    except processes.PeersMissing as error:
        return processes.end(1, f"error: {error}")
    except KeyboardInterrupt as stopped:  # before the first update, or a second Ctrl-C
        code, what = (
            (EXIT_INTERRUPTED, "terminated")
            if isinstance(stopped, Stopped)
            else (130, "interrupted")
        )
        processes.end(code, f"{what}; nothing more was saved")
        sys.stdout.flush()
        os._exit(code)  # a compilation that still runs in XLA's threads would crash a slower exit
    except Diverged as error:
        return processes.end(EXIT_DIVERGED, f"error: {error}")
    except Exception:  # with several processes also where another one died
        return processes.end(1, traceback.format_exc().rstrip())


def run(config, flags) -> int:
    """Trains; returns the exit code."""
    from inl_jax.parallel import processes
    from inl_jax.parallel.launch import find_launch
    from inl_jax.parallel.sharding import fit_to_mesh, make_mesh
    from inl_jax.planning.preflight import check_machine, check_same_config
    from inl_jax.planning.xla import apply_flags, use_compile_cache
    from inl_jax.trainer import train
    from inl_jax.training.state import make_layout
    from inl_jax.training.stop import EXIT_INTERRUPTED

    launch = find_launch(
        os.environ,
        coordinator=flags.coordinator,
        num_processes=flags.num_processes,
        process_id=flags.process_id,
    )
    processes.start(launch, start_timeout=flags.start_timeout, peer_timeout=flags.peer_timeout)
    apply_flags(config.xla_flags)
    if flags.dry_run:
        check_same_config(config)
        mesh = make_mesh(config.mesh)
        fitted = fit_to_mesh(config, mesh)
        check_machine(config, fitted, mesh, make_layout(fitted, mesh))
        return 0
    use_compile_cache()
    return EXIT_INTERRUPTED if train(config).interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
