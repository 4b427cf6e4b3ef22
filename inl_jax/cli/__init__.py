"""The `inl` command: one file a verb. `python scripts/VERB.py` calls the same function."""
