"""What a chat template tells an exporter: its text, and which token ends an assistant's turn."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

_TEMPLATE_FILE = "chat_template.jinja"
_CONFIG_FILE = "tokenizer_config.json"
# Letters only, so that no template trims or escapes it.
_MARK = "Qanswerx"


def read_chat_template(folder: Path) -> str | None:
    """The folder's template: ``chat_template.jinja``, else the one in ``tokenizer_config.json``; None without one.

    Marks around what an assistant generates, which some trainers add and llama.cpp does not know, are taken out.
    """
    file = folder / _TEMPLATE_FILE
    if file.is_file():
        return remove_generation_marks(file.read_text(encoding="utf-8"))
    config = folder / _CONFIG_FILE
    template = json.loads(config.read_bytes()).get("chat_template") if config.is_file() else None
    return remove_generation_marks(template) if isinstance(template, str) else None


def remove_generation_marks(template: str) -> str:
    """``{% generation %}`` blocks as blocks that every engine knows, with the same effect on white space."""
    opened = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", template)
    return re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", opened)


def find_turn_end(template: str, tokens: Collection[str], words: Mapping[str, str]) -> str | None:
    """The added token that follows an assistant's content, found by rendering a conversation of two messages.

    Args:
        template: The Jinja template.
        tokens: All added tokens.
        words: What the template may call ``bos_token`` and ``eos_token``.

    Returns:
        The token, or None where nothing follows, or the template wants more than messages.
    """
    messages = [{"role": "user", "content": "Qquestionx"}, {"role": "assistant", "content": _MARK}]
    try:
        text = (
            _build_environment().from_string(template).render(messages=messages, add_generation_prompt=False, **words)
        )
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
        return None
    rest = text.rpartition(_MARK)[2].lstrip() if _MARK in text else ""
    starts = [token for token in tokens if token and rest.startswith(token)]
    return max(starts, key=len, default=None)


def render_template(template: str, messages: Sequence[Mapping[str, Any]], words: Mapping[str, Any]) -> str | None:
    """The prompt for the next answer, as transformers renders it; None where the template refuses the messages.

    Args:
        template: The Jinja template.
        messages: Each with ``role`` and ``content``.
        words: What else the template may name: ``bos_token``, ``eos_token``, ``tools``.
    """
    try:
        compiled = _build_environment().from_string(template)
        return str(compiled.render(messages=messages, add_generation_prompt=True, **words))
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
        return None


def find_default_system(template: str, words: Mapping[str, Any]) -> str | None:
    """The system message that a template adds to conversations without one; None where it adds none.

    Found by rendering one question with a system message and without: what stands in its place is the default.
    """
    question = [{"role": "user", "content": "Qquestionx"}]
    told = render_template(template, [{"role": "system", "content": _MARK}, *question], words)
    silent = render_template(template, question, words)
    if told is None or silent is None or told.count(_MARK) != 1:
        return None
    before, _, after = told.partition(_MARK)
    if len(silent) <= len(before) + len(after) or not (silent.startswith(before) and silent.endswith(after)):
        return None
    return silent[len(before) : len(silent) - len(after)]


def _build_environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up for chat templates; sandboxed, since templates come from downloads."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None, **_: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = _raise_template_error
    environment.globals["strftime_now"] = _format_now
    return environment


def _format_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)


def _raise_template_error(message: Any) -> None:
    raise TemplateError(str(message))
