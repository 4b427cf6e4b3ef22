"""INL-LLM in JAX."""
