"""Secrets, kept out of what a run records and shows."""

import os
import re
from typing import Any

HIDDEN = "***"

_SECRET = r"(?:api_?key|access_?key|token|secret|password|passwd|credentials?)"
_NAME = re.compile(rf"(?:.*[_.-])?(?:key|{_SECRET})", re.IGNORECASE)
_IN_TEXT = [
    (re.compile(r"(\w+://)[^\s/@]+@"), rf"\1{HIDDEN}@"),  # user:password@host
    (re.compile(rf"([?&;][^\s=&]*(?:{_SECRET}|sig|signature)=)[^\s&]+", re.I), rf"\1{HIDDEN}"),
    (  # a flag, and an assignment as before a command or in JSON
        re.compile(
            rf"(--?[\w.-]*(?:key|{_SECRET})(?:=|\s+)|\b[\w.-]*{_SECRET}[\"']?\s*[=:]\s*)"
            r"(?:'[^']*'|\"[^\"]*\"|[^\s&,]+)",
            re.I,
        ),
        rf"\1{HIDDEN}",
    ),
    # Hugging Face, OpenAI, GitHub, GitLab, Slack, AWS, W&B, JSON web tokens.
    (
        re.compile(
            r"\b(?:(?:hf_|sk-|gh[opsu]_|github_pat_|glpat-|xox[a-z]-|wandb_v\d_)[\w-]{16,}"
            r"|AKIA[A-Z0-9]{16}|eyJ[\w-]{8,}\.[\w-]+\.[\w-]+)"
        ),
        HIDDEN,
    ),
]


def redact(value: Any) -> Any:
    """`value` with the secrets in it replaced by `***`.

    Hidden are: entries of dicts with a name such as `api_key`; passwords and tokens in URLs; values
    of flags such as `--token` and of assignments such as `DB_PASSWORD=...`; tokens of a known form;
    and the values of this process's environment variables that are named as secrets, wherever they
    stand.

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
        if len(secret) >= 8 and _NAME.fullmatch(name):
            value = value.replace(secret, HIDDEN)
    for pattern, replacement in _IN_TEXT:
        value = pattern.sub(replacement, value)
    return value
