"""The `inl` command: one file a verb."""
