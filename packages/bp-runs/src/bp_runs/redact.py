"""Secrets out of anything that is written or shown."""

from __future__ import annotations

import re
from typing import Any

MASK = "[redacted]"

_SECRETS = (
    re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}"),  # Hugging Face
    re.compile(r"\bsk-(?:[A-Za-z0-9]+-)*[A-Za-z0-9_-]{16,}"),  # OpenAI, Anthropic, OpenRouter …
    re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),  # AWS key id
    re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,})"),
    re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"),  # JWT
)
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}")
_URL_CREDENTIALS = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)[^\s/@:]+:[^\s/@]+@")
_NAMED = re.compile(
    r"(?i)(['\"]?[a-z0-9_.-]*(?:password|passwd|secret|api[_-]?key|access[_-]?key|auth[_-]?token|hub[_-]?token|"
    r"_token)['\"]?\s*[=:]\s*)(\"[^\"]*\"|'[^']*'|[^\s,;&}\]]+)"
)
_SECRET_KEY = re.compile(r"(?i)(password|passwd|secret|api_?key|access_?key|(^|[_.-])token$)")


def redact(text: str) -> str:
    """``text`` with every secret that can be recognised by its shape or its name masked."""
    for pattern in _SECRETS:
        text = pattern.sub(MASK, text)
    text = _BEARER.sub(rf"\1 {MASK}", text)
    text = _URL_CREDENTIALS.sub(rf"\1{MASK}@", text)
    return _NAMED.sub(rf"\1{MASK}", text)


def redact_data(data: Any) -> Any:
    """`redact` through mappings and sequences; a value under a secret's name is masked whole."""
    if isinstance(data, str):
        return redact(data)
    if isinstance(data, dict):
        return {
            k: MASK if v and isinstance(v, str) and _SECRET_KEY.search(str(k)) else redact_data(v)
            for k, v in data.items()
        }
    if isinstance(data, list | tuple):
        return [redact_data(v) for v in data]
    return data
