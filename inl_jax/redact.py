"""Secrets, kept out of what a run records and shows."""

import os
import re
from typing import Any

HIDDEN = "***"


def _name(character: str, *words: str) -> str:
    """Pattern of a secret's name: what it ends in, as PGPASSWORD, or which word stands last."""
    ending = r"(?:(?:api|access)[_-]?key|token|secret|pass(?:word|wd|phrase)|credentials?)"
    last = "|".join(["auth", "authorization", "pwd", *words])
    return rf"(?:{character}*{ending}|(?:{character}*[_.-])?(?:{last}))"


_NAME = re.compile(_name(".", "key"), re.I)
_PARAMETER = _name(r"[^\s=&?;]", "key", "sig", "signature")
_FLAG, _VARIABLE = _name(r"[\w.-]", "key"), _name(r"[\w.-]")
_VALUE = (
    r"(?:(?:bearer|basic|digest|token)\s+(?!-))?"
    r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^\s&,]+)"""
)
_IN_TEXT = [  # each keeps its group and hides the rest
    re.compile(pattern, re.I)
    for pattern in (
        r'(://)[^\s/"]*(?=@)',  # user:password@host
        # The same with a slash in the password, or without the scheme; a port has only digits.
        r"(//)[^\s/@:\[]+:(?!\d+[/?#])(?:[^\s/]*|\S{0,500})(?=@)",
        rf"([?&;]{_PARAMETER}=)[^\s&]+",
        rf"((?<![\w.-])--?{_FLAG}(?:=|\s+)){_VALUE}",  # a flag
        # An assignment as before a command, in JSON or in a header.
        rf"((?<![\w.-]){_VARIABLE}[\"']?\s*[=:]\s*){_VALUE}",
        r"(\bbearer\s+)[\w.~+/=-]{16,}",
        # Hugging Face, OpenAI, GitHub, GitLab, Slack, AWS, W&B, JSON web tokens.
        r"(\b)(?-i:(?:hf_|sk-|gh[opsu]_|github_pat_|glpat-|xox[a-z]-|wandb_v\d_)[\w-]{16,}"
        r"|AKIA[A-Z0-9]{16}|eyJ[\w-]{8,}\.[\w-]+\.[\w-]+)",
    )
]


def redact(value: Any) -> Any:
    """`value` with the secrets in it replaced by `***`.

    Hidden are: entries of dicts with a name such as `api_key`; passwords and tokens in URLs; values
    of flags such as `--token`, of assignments such as `DB_PASSWORD=...` and of the header
    `Authorization:`; tokens of a known form; and the values of this process's environment variables
    that are named as secrets, wherever they stand.

    Args:
      value: strings, numbers, and dicts, lists and tuples of them.
    """
    if isinstance(value, dict):
        return {
            redact(key): HIDDEN if _NAME.fullmatch(str(key)) and entry else redact(entry)
            for key, entry in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(redact(entry) for entry in value)
    if not isinstance(value, str):
        return value
    for name, secret in os.environ.items():
        if len(secret) >= 8 and _NAME.fullmatch(name) and name != "PWD":  # that is the directory
            value = value.replace(secret, HIDDEN)
    for pattern in _IN_TEXT:
        value = pattern.sub(rf"\1{HIDDEN}", value)
    return value
