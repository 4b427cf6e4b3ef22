"""The published guide's script: run it, or `from train_inl_llm_large import train_inl_llm`."""

if __name__ == "__main__":
    from inl_jax.questions import main

    main()
else:
    from inl_jax.guide import train_inl_llm as train_inl_llm
