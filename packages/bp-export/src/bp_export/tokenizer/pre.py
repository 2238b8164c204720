r"""Which of llama.cpp's splitting rules a tokenizer.json uses, recognised from its normalizer and pre-tokenizer.

llama.cpp's converter encodes a fixed text and looks its hash up; that needs the tokenizers package and breaks whenever
a tokenizer gains a token. Here the rule itself is compared, as JSON, with a table. The expressions are those that
Llama 3, Qwen 2 and 3.5, GPT-4o and Mistral Nemo publish in their tokenizer.json, and llama.cpp names beside its own
(llama-vocab.cpp); GPT-2's is built into the tokenizers package's ByteLevel.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

from bp_export.errors import PreTokenizerUnknownError

Rule: TypeAlias = tuple[tuple[str, ...], ...]
"""The steps of a pre-tokenizer, each as its type and what matters of its settings."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
_QWEN35 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _SPACES
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_HEAD = r"[^\r\n\p{L}\p{N}]?"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES
_TEKKEN = f"{_HEAD}{_UPPER}*{_LOWER}+|{_HEAD}{_UPPER}+{_LOWER}*" + r"|\p{N}" + _TAIL
_GPT4O = f"{_HEAD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_HEAD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?" + r"|\p{N}{1,3}" + _TAIL

_WITH_GPT2_RULE = ("ByteLevel", "splits")
_BYTES_ONLY = ("ByteLevel", "bytes only")

_RULES: Mapping[Rule, str] = MappingProxyType(
    {
        (_WITH_GPT2_RULE,): "gpt-2",
        (("Digits", "one by one"), _WITH_GPT2_RULE): "smollm",
        (("Split", _LLAMA), _BYTES_ONLY): "llama-bpe",
        (("Split", _QWEN2), _BYTES_ONLY): "qwen2",
        (("Split", _QWEN35), _BYTES_ONLY): "qwen35",
        (("Split", _GPT4O), _BYTES_ONLY): "gpt-4o",
        (("Split", _TEKKEN), _BYTES_ONLY): "tekken",
    }
)
# llama.cpp normalizes nothing; it takes the text of these two as composed already.
_COMPOSED = ("qwen2", "qwen35")
# With these names llama.cpp takes a word that is a token whole, without trying its merges.
_WHOLE_WORDS = ("llama-bpe", "tekken")


def recognise_pre(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name of the splitting rule in a ``tokenizer.json``.

    Raises:
        PreTokenizerUnknownError: It has none that is known here.
    """
    steps = tokenizer.get("pre_tokenizer") or {}
    rule = tuple(_describe(step) for step in steps.get("pretokenizers", [steps]))
    name = _RULES.get(rule)
    if name is None:
        raise _build_error("the pre-tokenizer", steps)
    normalizer = tokenizer.get("normalizer")
    if normalizer and not (name in _COMPOSED and normalizer.get("type") == "NFC"):
        raise _build_error("the normalizer", normalizer)
    if (name in _WHOLE_WORDS) != bool(tokenizer["model"].get("ignore_merges")):
        raise _build_error(f"ignore_merges beside the rule of {name}", tokenizer["model"].get("ignore_merges"))
    return name


def _describe(step: Mapping[str, Any]) -> tuple[str, ...]:
    kind = str(step.get("type"))
    if kind == "Digits":
        return kind, "one by one" if step.get("individual_digits") else "together"
    if kind == "ByteLevel":
        if step.get("add_prefix_space"):
            return kind, "adds a space"
        return _WITH_GPT2_RULE if step.get("use_regex", True) else _BYTES_ONLY
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return kind, str((step.get("pattern") or {}).get("Regex"))
    return kind, json.dumps(step, sort_keys=True)


def _build_error(what: str, value: Any) -> PreTokenizerUnknownError:
    return PreTokenizerUnknownError(
        f"{what} of tokenizer.json is not known: {json.dumps(value, ensure_ascii=False)[:200]}",
        details={"known": sorted(set(_RULES.values()))},
    )
