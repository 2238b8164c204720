"""Which of transformers' classes the pinned converter knows: a table, so that nothing has to be installed to answer.

``classes.json`` is written by tests/make_llama_cpp_classes.py from the converter itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

BUILD = 11434
"""llama.cpp's build, whose converter is used and with which files of ours are compared byte by byte."""
VIA = f"llama.cpp b{BUILD}"


@cache
def _read_table() -> Mapping[str, frozenset[str]]:
    text = files("bp_export.llama_cpp").joinpath("classes.json").read_text(encoding="utf-8")
    return {kind: frozenset(names) for kind, names in json.loads(text).items()}


def list_classes() -> frozenset[str]:
    """Classes of language models that the converter writes."""
    return _read_table()["text"]


def converts(config: Mapping[str, Any]) -> bool:
    """Whether the converter writes the language model of this ``config.json``."""
    return name_class(config) in _read_table()["text"]


def converts_vision(config: Mapping[str, Any]) -> bool:
    """Whether the converter writes an ``mmproj`` file with the vision or audio tower of this ``config.json``."""
    return name_class(config) in _read_table()["vision"]


def name_class(config: Mapping[str, Any]) -> str:
    """The class that ``config.json`` names first."""
    return str((config.get("architectures") or ["(none named)"])[0])
