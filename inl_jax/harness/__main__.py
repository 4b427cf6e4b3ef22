"""`lm_eval` itself, with the model `inl_jax` and our tasks.

python -m inl_jax.harness --model inl_jax --model_args checkpoint=RUN,step=best --tasks needle
"""

import sys

from inl_jax.harness.tasks import FOLDER


def main() -> None:
    """Runs lm_eval with the process's command line."""
    from lm_eval.__main__ import cli_evaluate

    import inl_jax.harness.adapter  # noqa: F401  registers the model

    if "--include_path" not in sys.argv:
        sys.argv += ["--include_path", str(FOLDER)]
    cli_evaluate()


if __name__ == "__main__":
    main()
