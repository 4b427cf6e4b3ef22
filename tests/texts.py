"""Sources of text, and readers of what became of them, that the tests of this folder share."""

import json

import numpy as np

from inl_jax.tokens.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")
GPT2 = load_tokenizer("gpt2")
DOCUMENTS = [f"Document {i}: naïve 猫 🙂\r\n" + "words and more words\n" * i for i in range(40)]


def write_files(folder, documents=DOCUMENTS):
    folder.mkdir(parents=True)
    for i, text in enumerate(documents):
        (folder / f"{i:03}.txt").write_bytes(text.encode())
    return folder


def write_jsonl(file, documents=DOCUMENTS, column="text", opener=open):
    with opener(file, "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"id": 1, column: text}) + "\n" for text in documents)
    return file


def split_texts(source, split, tokenizer=BYTES):
    """The documents of a split, in order."""
    ids = source.open(split)[:]
    ends = np.flatnonzero(ids == tokenizer.end_id)
    assert len(ids) == 0 or ends[-1] == len(ids) - 1, "an end token must follow every document"
    return [tokenizer.decode(part) for part in np.split(ids, ends + 1)[:-1]]


def leftovers(tmp_path):
    return [path.name for path in (tmp_path / "cache").iterdir()]
