"""Go templates for Ollama's older servers, which cannot run the Jinja template in a GGUF and know few by heart.

Each says a conversation of system, user and assistant in one family's marks; what a Jinja template does beyond that
(tools, dates, default systems) is not in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_TURNS = "{{- range .Messages }}"
_CHATML = _TURNS + "<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
_LLAMA3 = (
    _TURNS + "<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>{{ end }}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
_PHI4 = _TURNS + "<|{{ .Role }}|>{{ .Content }}<|end|>{{ end }}<|assistant|>"
_GEMMA = (
    '{{- range .Messages }}<start_of_turn>{{ if eq .Role "assistant" }}model{{ else }}user{{ end }}\n'
    "{{ .Content }}<end_of_turn>\n{{ end }}<start_of_turn>model\n"
)
_BY_MARK: Mapping[str, str] = MappingProxyType(
    {
        "<|im_start|>": _CHATML,
        "<|start_header_id|>": _LLAMA3,
        "<start_of_turn>": _GEMMA,
        "<|end|>": _PHI4,
    }
)


def find_go_template(jinja: str) -> str | None:
    """The Go template of the family whose marks a Jinja template has; None for families that are not known."""
    return next((template for mark, template in _BY_MARK.items() if mark in jinja), None)


def is_of_other_family(found: str, jinja: str) -> bool:
    """Whether a Go template has none of the marks of a Jinja template whose family is known.

    Ollama takes the nearest of the templates that it knows by heart, by edit distance: for a short one that may be
    another family's.
    """
    mark = next((mark for mark in _BY_MARK if mark in jinja), None)
    return mark is not None and mark not in found
