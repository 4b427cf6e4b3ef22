"""`inl export`, from a clone: see inl_jax/cli."""

from inl_jax.cli.main import main

if __name__ == "__main__":
    main("export")
