"""`python -m inl_jax VERB` is `inl VERB`."""

import sys

from inl_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
