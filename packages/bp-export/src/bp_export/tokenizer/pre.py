r"""Which of llama.cpp's splitting rules a tokenizer.json uses, recognized from what it does, else from what it says.

As llama.cpp's converter does, a fixed text is encoded and the hash of its ids looked up; ``pre_hashes.json`` holds the
converter's table. That needs the package tokenizers, and knows published vocabularies only. For others the rule itself
is compared, as JSON. The expressions are those that Llama 3, Qwen 2 and 3.5, GPT-4o and Mistral Nemo publish in their
tokenizer.json, and llama.cpp names besides its own (llama-vocab.cpp); GPT-2's is built into ByteLevel of tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from bp_export.errors import PreTokenizerUnknownError
from bp_runs.wording import setting_ref

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
# Texts on which the known rules differ from each other: digits, contractions, cases, marks, lines, blanks, scripts.
_PROBES = (
    "Hello world",
    "In 2026 it cost 1234567.89 dollars",
    "I'm sure THEY'LL go, don't",
    "camelCaseWORDSHere HTTPServer",
    "a\n\nb  c\t\td\r\n   e   ",
    "x=1;y/=2 //comment\n/path/to\n",
    "\u00e9t\u00e9 e\u0301te\u0301 \u0915\u094d\u0937\u0947\u0924\u094d\u0930 \u0e44\u0e17\u0e22",
    "\u4f60\u597d\uff0c\u4e16\u754c 123\u5e74",
    "\U0001f600\U0001f680 !!! ??? ...",
)
# llama.cpp normalizes nothing; it takes the text of these two as composed already.
_COMPOSED = ("qwen2", "qwen35")
# With these names llama.cpp takes a word that is a token whole, without trying its merges.
_WHOLE_WORDS = ("llama-bpe", "tekken")
# The same rules where words are merged: llama.cpp's name for cl100k, as Phi-4's tokenizer is.
_WITH_MERGES: Mapping[str, str] = MappingProxyType({"llama-bpe": "dbrx"})


# The converter's text (``get_vocab_base_pre``), of which the hashes are.
_HASHED = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n\U0001f680 (normal) \U0001f636\u200d\U0001f32b\ufe0f "
    "(multiple emojis concatenated) \u2705 \U0001f999\U0001f999 3 33 333 3333 33333 333333 3333333 33333333"
    " 3.3 3..3 3...3 \u1780\u17b6\u1793\u17cb\u178f\u17c2\u1796\u17b7\u179f\u17c1\u179f\u17a2\u17b6\u1785"
    "\U0001f601 ?\u6211\u60f3\u5728apple\u5de5\u4f5c1314151\u5929\uff5e ------======= \u043d\u0435\u0449"
    "\u043e \u043d\u0430 \u0411\u044a\u043b\u0433\u0430\u0440\u0441\u043a\u0438 ''''''```````\"\"\"\"...."
    "..!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, 'D you like some te"
    "a? We'Ve a'lL"
)


def recognise_pre(tokenizer: Mapping[str, Any], file: Path | None = None) -> str:
    """llama.cpp's name of the splitting rule in a ``tokenizer.json``.

    Args:
        tokenizer: Its content.
        file: Itself, for what it does; without it, or without the package tokenizers, what it says counts.

    Raises:
        PreTokenizerUnknownError: It has none that is known here.
    """
    return (find_by_hash(file) if file else None) or _recognise_by_rule(tokenizer)


def find_by_hash(file: Path) -> str | None:
    """The rule of a published vocabulary, by the ids of the converter's text; None for others."""
    try:
        from tokenizers import Tokenizer  # an extra
    except ImportError:
        return None
    try:
        engine = Tokenizer.from_buffer(file.read_bytes())
    except Exception:  # noqa: BLE001  # the library raises bare Exception for a file that it cannot read
        return None
    engine.no_truncation()
    engine.no_padding()
    for has_specials in (True, False):
        ids = engine.encode(_HASHED, add_special_tokens=has_specials).ids
        if name := read_hashes().get(sha256(str(ids).encode()).hexdigest()):
            return name
    return None


@cache
def read_hashes() -> Mapping[str, str]:
    """llama.cpp's name of the rule, by the hash of the ids."""
    text = files("bp_export.tokenizer").joinpath("pre_hashes.json").read_text(encoding="utf-8")
    return MappingProxyType(json.loads(text)["hashes"])


def _recognise_by_rule(tokenizer: Mapping[str, Any]) -> str:
    steps = tokenizer.get("pre_tokenizer") or {}
    rule = tuple(_describe(step) for step in steps.get("pretokenizers", [steps]))
    name = _RULES.get(rule)
    normalizer = _simplify(tokenizer.get("normalizer"))
    if name is None:
        raise _build_error("the pre-tokenizer", steps, tokenizer)
    if normalizer and not (name in _COMPOSED and normalizer.get("type") == "NFC"):
        raise _build_error("the normalizer", normalizer, tokenizer)
    if not tokenizer["model"].get("ignore_merges"):
        name = _WITH_MERGES.get(name, name)
    if (name in _WHOLE_WORDS) != bool(tokenizer["model"].get("ignore_merges")):
        found = tokenizer["model"].get("ignore_merges")
        raise _build_error(f"ignore_merges beside the rule of {name}", found, tokenizer)
    return name


def find_fitting_rules(tokenizer: Mapping[str, Any]) -> list[str]:
    """The known rules that split the probe texts as a tokenizer does, whatever its files say; needs ``tokenizers``.

    An empty list also without that package.
    """
    try:
        from tokenizers import Tokenizer  # an extra
    except ImportError:
        return []

    def split(normalizer: Any, steps: Any) -> list[list[str]]:
        model = {"type": "BPE", "vocab": {}, "merges": []}
        rule = {"version": "1.0", "normalizer": normalizer, "pre_tokenizer": steps, "model": model, "added_tokens": []}
        engine = Tokenizer.from_str(json.dumps(rule))
        texts = [engine.normalizer.normalize_str(t) if engine.normalizer else t for t in _PROBES]
        return [[word for word, _ in engine.pre_tokenizer.pre_tokenize_str(text)] for text in texts]

    try:
        wanted = split(tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer"))
    except Exception:  # noqa: BLE001  # the library raises bare Exception for a file that it cannot read
        return []
    whole = bool(tokenizer["model"].get("ignore_merges"))
    named = {name if whole else _WITH_MERGES.get(name, name): rule for rule, name in _RULES.items()}
    known = {name: rule for name, rule in named.items() if (name in _WHOLE_WORDS) == whole}
    return [name for name, rule in known.items() if split(_build_normalizer(name), _build_steps(rule)) == wanted]


def _build_normalizer(name: str) -> dict[str, str] | None:
    return {"type": "NFC"} if name in _COMPOSED else None


def _build_steps(rule: Rule) -> dict[str, Any]:
    """A rule as tokenizer.json has it."""
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps: list[dict[str, Any]] = []
    for kind, what in rule:
        if kind == "ByteLevel":
            steps.append({**plain, "use_regex": what == "splits"})
        elif kind == "Digits":
            steps.append({"type": "Digits", "individual_digits": True})
        else:
            steps.append({"type": "Split", "pattern": {"Regex": what}, "behavior": "Isolated", "invert": False})
    return {"type": "Sequence", "pretokenizers": steps}


def _simplify(normalizer: Any) -> dict[str, Any] | None:
    """A normalizer without steps that change nothing; None if none is left."""
    if not isinstance(normalizer, dict):
        return None
    kind = normalizer.get("type")
    if kind == "Sequence":
        steps = [step for step in map(_simplify, normalizer.get("normalizers") or []) if step]
        return steps[0] if len(steps) == 1 else {"type": kind, "normalizers": steps} if steps else None
    is_idle = (
        (kind == "Strip" and not (normalizer.get("strip_left", True) or normalizer.get("strip_right", True)))
        or (kind == "Prepend" and not normalizer.get("prepend"))
        or (kind == "Replace" and (normalizer.get("pattern") or {}).get("String") == normalizer.get("content"))
    )
    return None if is_idle else normalizer


def _describe(step: Mapping[str, Any]) -> tuple[str, ...]:
    kind = str(step.get("type"))
    if kind == "Digits":
        return kind, "one by one" if step.get("individual_digits") else "together"
    if kind == "ByteLevel":
        if step.get("add_prefix_space"):
            return kind, "adds a space"
        return _WITH_GPT2_RULE if step.get("use_regex", True) else _BYTES_ONLY
    # What does not match is removed, or is a word: the same, since these expressions match every character.
    cuts = (step.get("behavior"), bool(step.get("invert")))
    if kind == "Split" and cuts in (("Isolated", False), ("Removed", True)):
        return kind, str((step.get("pattern") or {}).get("Regex"))
    return kind, json.dumps(step, sort_keys=True)


def _build_error(what: str, value: Any, tokenizer: Mapping[str, Any]) -> PreTokenizerUnknownError:
    fitting = find_fitting_rules(tokenizer)
    hint = None
    if len(fitting) == 1:
        name = setting_ref("pre", fitting[0])
        hint = f"It splits {len(_PROBES)} probe texts as llama.cpp's rule {fitting[0]} does: {name}"
    is_blind = find_spec("tokenizers") is None
    return PreTokenizerUnknownError(
        f"{what} of tokenizer.json is not known: {json.dumps(value, ensure_ascii=False)[:200]}",
        cause="the package tokenizers, which shows what the rule does, is not installed" if is_blind else None,
        fix=hint,
        details={"known": sorted(set(_RULES.values())), "fitting": fitting},
    )
