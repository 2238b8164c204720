"""A model's ``config.json`` as it holds for what is exported: completed, with the tables' sizes, tied or not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any

import numpy as np

from bp_merge import FoldedModel, strip_wrappers

_HEAD, _TABLE = "lm_head.weight", "embed_tokens.weight"
_BLOCK_ROWS = 4096


def complete_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with what its class in transformers assumes where it is silent, as Google's Gemma 3 is.

    ``text_config`` is completed by its own kind; a language model out of a larger one says ``gemma3_text`` there.
    """
    text = config.get("text_config")
    if not isinstance(text, dict):
        return {**_find_defaults(config), **config}
    told = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
    return {**config, "text_config": {**_find_defaults(text), **told, **text}}


def _find_defaults(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = _read_table().get(str(config.get("model_type")), {})
    return found


@cache
def _read_table() -> Mapping[str, Mapping[str, Any]]:
    """By ``model_type``; written by tests/make_config_defaults.py from transformers' config classes."""
    text = files("bp_export.architectures").joinpath("defaults.json").read_text(encoding="utf-8")
    return MappingProxyType(json.loads(text))


def fit_config(config: Mapping[str, Any], model: FoldedModel) -> dict[str, Any]:
    """The config as it is with the adapter: tokens that were added or cut, and whether head and embedding are one.

    The tensors are believed over the config. A config may say ``tie_word_embeddings`` next to a head of its own, after
    training one or the other; transformers 5 then keeps the two apart, and so does this.
    """
    changes: dict[str, Any] = {}
    tables = [name for name in model.tensors if strip_wrappers(name) == _TABLE]
    if len(tables) == 1 and tables[0] in model.changed:
        changes["vocab_size"] = model.tensors[tables[0]].rows
    head = _find_own_head(model) if _is_tied(complete_config(config)) else None
    if head and tables and _differ(model, head, tables[0]):
        changes["tie_word_embeddings"] = False
    if not changes:
        return dict(config)
    text = config.get("text_config")
    inner = {"text_config": {**text, **changes}} if isinstance(text, dict) else {}
    return {**config, **changes, **inner}


def _is_tied(config: Mapping[str, Any]) -> bool:
    inner = config.get("text_config")
    return bool(config.get("tie_word_embeddings") or (isinstance(inner, dict) and inner.get("tie_word_embeddings")))


def _find_own_head(model: FoldedModel) -> str | None:
    return next((name for name in model.tensors if strip_wrappers(name) == _HEAD), None)


def _differ(model: FoldedModel, head: str, table: str) -> bool:
    """Whether any value differs; stops at the first rows that do."""
    rows = model.tensors[table].rows
    if model.tensors[head].shape != model.tensors[table].shape:
        return True
    return any(
        not np.array_equal(model.read_rows(head, start, stop), model.read_rows(table, start, stop))
        for start, stop in ((i, min(i + _BLOCK_ROWS, rows)) for i in range(0, rows, _BLOCK_ROWS))
    )
