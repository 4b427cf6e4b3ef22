"""How generated texts are shown: one as it grows, or several when they are finished."""

from collections.abc import Sequence

from inl_jax.console import plural, say, show
from inl_jax.sampling import LanguageModel
from inl_jax.sampling.continuation import Continuation


def show_growing(model: LanguageModel, prompt: str, **settings) -> list[Continuation]:
    """Shows a prompt and its continuation as it comes, until stdout has no reader.

    Returns:
      The continuation, alone in a list.
    """
    growing = model.grow(prompt, **settings)  # checks the settings before anything is shown
    texts: list[Continuation] = []
    has_reader = show(prompt, end="")
    try:
        for texts in growing:
            has_reader = has_reader and show(texts[0].take(), end="")
            if not has_reader:
                return texts
    except KeyboardInterrupt:
        show("")  # what is said of it gets a line of its own
        raise
    whole = prompt + texts[0].text
    if whole and not whole.endswith("\n"):
        show("")
    return texts


def show_finished(texts: Sequence[Continuation]) -> None:
    """Shows prompts with their continuations, with a line between."""
    for text in texts:
        whole = text.prompt + text.text
        show(f"{whole}\n{'-' * 40}" if whole else "-" * 40)


def say_what_was_made(texts: Sequence[Continuation], seconds: float) -> None:
    """Says how many tokens there are, and how many texts are empty and why."""
    tokens = sum(text.num_tokens for text in texts)
    say(f"{plural(tokens, 'token')} in {seconds:.1f} s, compilation included")
    empty = [text for text in texts if text.finish_reason == "end" and not text.num_tokens]
    if empty:
        what = "the text is" if len(texts) == 1 else f"{len(empty)} of {len(texts)} texts are"
        say(f"{what} empty: the model gave its end token at once; --ignore_end goes past it")
