"""Small tokenizers of the kinds that are published."""

import json

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

PARAGRAPH = (
    "Some words here, and there (again); done.\n\n    indented text follows. 12345678 don't\r\n"
    "\t\twe'll: naïve 猫 🙂 x==y;\n"
)
# Llama 3's, nearly that of cl100k.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def bpe(model=(), *, normalizer=None, split=None, decoder=None, special=(), size=420):
    """A BPE trained on PARAGRAPH; its end token is </s>."""
    backend = tokenizers.Tokenizer(models.BPE(**dict(model)))
    alphabet = [] if special else pre_tokenizers.ByteLevel.alphabet()
    if normalizer:
        backend.normalizer = normalizer
    if split:
        backend.pre_tokenizer = split
    if decoder:
        backend.decoder = decoder
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[*special, "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator([PARAGRAPH] * 9, trainer)
    content = json.loads(backend.to_str())  # the trainer takes the bytes as special tokens only
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] not in BYTES]
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def llama2():
    """Marks spaces in the text, with one before it, and splits nothing."""
    backend = bpe(
        {"unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True},
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        split=pre_tokenizers.Split("▁", "merged_with_next"),
        decoder=decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        ),
        special=["<unk>", *BYTES],
    )
    backend.pre_tokenizer = None
    return backend


def llama3():
    """Punctuation with the line ends after it, digits in threes from the left."""
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Sequence([split, letters])
    return bpe(split=split, decoder=decoders.ByteLevel())


def metaspace():
    return bpe(
        {"unk_token": "<unk>", "byte_fallback": True},
        split=pre_tokenizers.Metaspace(),
        decoder=decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
        special=["<unk>", *BYTES],
    )


def neox():
    """Runs of spaces are tokens, found before anything is split."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend = bpe(split=split, normalizer=normalizers.NFC(), decoder=decoders.ByteLevel())
    backend.add_tokens(["  ", "    ", "done.\n\n"])
    return backend


def unigram():
    """The likeliest split of the whole text."""
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator([PARAGRAPH] * 20, trainer)
    backend.pre_tokenizer = None
    return backend


def wordpiece():
    """Loses case, accents and white space; words beyond 100 characters are unknown."""
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=["[UNK]", "[SEP]"], show_progress=False
    )
    backend.train_from_iterator([PARAGRAPH] * 9, trainer)
    return backend


ALL = (llama2, llama3, metaspace, neox, unigram, wordpiece)
