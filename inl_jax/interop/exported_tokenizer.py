"""A tokenizer as the files of an exported model, with which transformers gives the same ids."""

import hashlib
import json
import os
from pathlib import Path

import tokenizers

from inl_jax.console import say
from inl_jax.files import json_text, write_text
from inl_jax.tokens.tokenizer import Tokenizer
from inl_jax.tokens.tokenizer_files import CONFIG_NAME, FILE_NAME


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, max_length: int) -> str:
    """Writes tokenizer.json and tokenizer_config.json, which `tokenizer.load` reads too.

    The end token also starts a text and pads: the model saw it between documents, and knows no
    other. A line says so if transformers reads the end token in a text that spells it.

    Args:
      tokenizer: of the run.
      folder: of the exported model.
      max_length: tokens beyond which transformers warns.

    Returns:
      How the end token is spelled.

    Raises:
      OSError: a file cannot be written.
    """
    tokenizer.save(folder)
    backend = tokenizers.Tokenizer.from_file(str(folder / FILE_NAME))
    if backend.num_special_tokens_to_add(is_pair=False):
        backend.post_processor = None  # it adds tokens to each text that the model never saw
    content = backend.to_str()
    write_text(folder / FILE_NAME, content)
    end = backend.id_to_token(tokenizer.end_id)
    settings = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")) | {
        "bos_token": end,
        "pad_token": end,
        "padding_side": "left",  # generation goes on at the right
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # text that spells a special token is plain text
        "inl_jax_sha256": hashlib.sha256(content.encode()).hexdigest(),
    }
    if os.path.isabs(tokenizer.name):
        del settings["inl_jax_name"]  # a path of this machine
    write_text(folder / CONFIG_NAME, json_text(settings, indent=2))
    backend.encode_special_tokens = True
    if tokenizer.end_id in backend.encode(end, add_special_tokens=False).ids:
        say(f"transformers reads {end!r} in a text as the end token; inl_jax leaves it out")
    return end
