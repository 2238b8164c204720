"""Prepared rows kept on disk, so that the next start with the same data and settings is at once."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import orjson

from bp_data.errors import RowFault
from bp_data.example import Rejected
from bp_data.ledger import Ledger
from bp_data.templates.engine import ChatTemplate
from bp_data.token_rows import INDEX_FILE, TOKENS_FILE, TokenRows
from bp_data.tokens import Tokenizer
from bp_runs.files import sha256_file

_FORMAT: Final = 3
_META_FILE: Final = "meta.json"
_KEPT: Final = 8  # entries; the ones used longest ago go first


def cache_key(data_sha256: str, tokenizer: Tokenizer, template: ChatTemplate, settings: Mapping[str, Any]) -> str:
    """Hex SHA-256 over everything that tokens and masks depend on."""
    dated = any("strftime_now" in text for text in template.texts.values())
    parts = {
        "format": _FORMAT,
        "order": sys.byteorder,
        "versions": {name: _version(name) for name in ("bp-data", "tokenizers", "jinja2")},
        "data": data_sha256,
        "tokenizer": tokenizer.sha256,
        "special": tokenizer.special_tokens,
        "stops": tokenizer.stop_ids,
        "template": template.sha256,
        "day": template.now.isoformat() if dated else None,
        "settings": dict(settings),
    }
    return hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"  # run from a checkout, through PYTHONPATH


def read_entry(folder: Path) -> tuple[TokenRows, Ledger, dict[str, Any]] | None:
    """An entry's rows, ledger and facts; None where it is not there, or not as it was written."""
    try:
        meta = orjson.loads((folder / _META_FILE).read_bytes())
        if meta["format"] != _FORMAT or meta["sha256"] != _hashes(folder):
            return None
        ledger = _to_ledger(meta["ledger"])
        rows = TokenRows.open(folder, meta["rows"])
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        return None
    with contextlib.suppress(OSError):
        (folder / _META_FILE).touch()
    return rows, ledger, meta


def write_meta(folder: Path, ledger: Ledger, *, rows: int, trained_tokens: int) -> None:
    """Complete an entry whose two files of rows are written and closed; done before its folder is published."""
    meta = {
        "format": _FORMAT,
        "rows": rows,
        "trained_tokens": trained_tokens,
        "sha256": _hashes(folder),
        "ledger": _from_ledger(ledger),
    }
    (folder / _META_FILE).write_bytes(orjson.dumps(meta))


def _hashes(folder: Path) -> dict[str, str]:
    return {name: sha256_file(folder / name) for name in (INDEX_FILE, TOKENS_FILE)}


def prune(cache: Path) -> None:
    """Keep the entries used last."""
    entries = [meta.parent for meta in sorted(cache.glob(f"*/{_META_FILE}"), key=_age) if meta.parent.name[:1] != "."]
    for old in entries[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def _age(meta: Path) -> float:
    try:
        return meta.stat().st_mtime
    except OSError:
        return 0.0


def _from_ledger(ledger: Ledger) -> dict[str, Any]:
    return {
        "read": ledger.read,
        "whole": ledger.whole,
        "truncated": ledger.truncated,
        "truncated_tokens": ledger.truncated_tokens,
        "truncated_rows": ledger.truncated_rows,
        "unsampled": ledger.unsampled,
        "pieces": ledger.pieces,
        "drops": [(d.number, d.code.value, d.reason, d.source, d.excerpt) for d in ledger.drops],
    }


def _to_ledger(data: dict[str, Any]) -> Ledger:
    drops = [Rejected(number, RowFault[code.removeprefix("ROW_")], *rest) for number, code, *rest in data.pop("drops")]
    return Ledger(**data, drops=drops)
