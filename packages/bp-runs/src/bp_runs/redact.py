"""Secrets out of anything that is written or shown."""

from __future__ import annotations

import re
from typing import Any

MASK = "[redacted]"
_SHORTEST = len("token=x")  # nothing shorter names a secret

# Where a secret may begin: not inside a word, but after an escape that only looks like one (\n, %3D, an ANSI color).
_START = r"(?:(?<![A-Za-z0-9])|(?<=\\[nrt])|(?<=%[0-9A-Fa-f]{2})|(?<=[0-9;]m))"
_SECRETS = (
    re.compile(r"(?:hf|api_org)_[A-Za-z0-9]{16,}"),  # Hugging Face
    re.compile(_START + r"sk-(?:[A-Za-z0-9]+-)*[A-Za-z0-9_-]{16,}"),  # OpenAI, Anthropic, OpenRouter …
    re.compile(_START + r"(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])"),  # AWS key id
    re.compile(r"(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,})"),
    re.compile(_START + r"gl(?:pat|dt|rt|cbt|ptt|soat)-[A-Za-z0-9_-]{20,}"),  # GitLab
    re.compile(_START + r"xox[abeoprs]-[A-Za-z0-9-]{10,}"),  # Slack
    re.compile(_START + r"AIza[A-Za-z0-9_-]{35}"),  # Google
    re.compile(r"eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"),  # JWT
)
_BEARER = re.compile(
    r"(?i)(authorization['\"\\]*\s*[:=]\s*['\"\\]*(?:basic|bearer|token)|\bbearer)\s+[A-Za-z0-9._~+/=-]{8,}"
)
_URL_CREDENTIALS = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)[^\s/?#]+@")
# Names of secrets; a tokenizer's pad_token, eos_token … are none.
_NAME = (
    r"(?:[a-z0-9]+[_.-])*(?:password|passwd|secret(?:[_-]?access)?(?:[_-]?key)?|api[_-]?key|access[_-]?key|"
    r"(?:(?:auth|access|hub|hf|api|id|refresh|session|bearer|github|wandb)[_-]?)token)|(?<![a-z0-9_.-])token"
)
_NAMED = re.compile(rf"(?i)({_NAME})(\\?['\"]?\s*[=:]\s*)(\\?\"[^\"\\]*\\?\"|\\?'[^'\\]*\\?'|[^\s,;&}}\"']+)")
_SECRET_KEY = re.compile(rf"(?i)^(?:{_NAME})$")


def redact(text: str) -> str:
    """``text`` with every secret that can be recognized by its shape or its name masked."""
    if len(text) < _SHORTEST:
        return text
    for pattern in _SECRETS:
        text = pattern.sub(MASK, text)
    text = _BEARER.sub(rf"\1 {MASK}", text)
    text = _URL_CREDENTIALS.sub(rf"\1{MASK}@", text)
    return _NAMED.sub(_mask_named, text)


def _mask_named(found: re.Match[str]) -> str:
    name, sign, value = found.groups()
    # "no end-of-text token: the model would never stop" is prose about tokens, which this project has much of.
    if name.lower() == "token" and sign.endswith(" ") and re.fullmatch(r"[A-Za-z][a-z'-]{0,15}[.!?]?", value):
        return found.group()
    return f"{name}{sign}{MASK}"


def redact_data(data: Any) -> Any:
    """`redact` through mappings and sequences; a value under a secret's name is masked whole."""
    if isinstance(data, str):
        return redact(data)
    if isinstance(data, dict):
        return {_redact_key(k): _redact_value(k, v) for k, v in data.items()}
    if isinstance(data, list | tuple):
        return [redact_data(v) for v in data]
    return data


def _redact_key(key: Any) -> Any:
    return redact(key) if isinstance(key, str) else key


def _redact_value(key: Any, value: Any) -> Any:
    return MASK if value and isinstance(value, str) and _SECRET_KEY.match(str(key)) else redact_data(value)
