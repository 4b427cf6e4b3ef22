"""Generation: prompts of ids or text, continued."""

from inl_jax.sampling.choice import Sampling
from inl_jax.sampling.decoding import generate
from inl_jax.sampling.text import LanguageModel

__all__ = ["LanguageModel", "Sampling", "generate"]
