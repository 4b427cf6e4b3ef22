"""Trains a model, or goes on with a run: python scripts/train.py --config configs/tiny.py.

Exit codes: 0 done; 2 a mistake in the input; 3 diverged; 75 stopped by SIGTERM or Ctrl-C after
saving, the same command goes on; 130 stopped by Ctrl-C with nothing more to save.
"""

import argparse
import sys

from inl_jax.config import exit_on_input_error, from_command_line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, add_help=False)
    parser.add_argument(
        "--dry_run", action="store_true", help="say what the run needs and stop, allocating nothing"
    )
    config, flags = from_command_line(parser)
    # Imported late: a mistake on the command line is answered before JAX starts.
    from inl_jax.sharding import make_mesh
    from inl_jax.train import EXIT_DIVERGED, EXIT_INTERRUPTED, Diverged, check_machine, train
    from inl_jax.xla import apply_flags, use_compile_cache

    with exit_on_input_error():
        apply_flags(config.xla_flags)
        if flags.dry_run:
            check_machine(config, make_mesh(config.mesh))
            return 0
        use_compile_cache()
        try:
            return EXIT_INTERRUPTED if train(config).interrupted else 0
        except KeyboardInterrupt:  # before the first update, or a second Ctrl-C
            print("interrupted; nothing more was saved", file=sys.stderr)
            return 130
        except Diverged as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_DIVERGED


if __name__ == "__main__":
    sys.exit(main())
