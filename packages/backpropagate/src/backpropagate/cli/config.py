"""`backprop config`: what the settings are, where each comes from, and how to set one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from backpropagate.cli.flags import Json, flag_names, spell
from backpropagate.cli.screen import print_json
from backpropagate.settings import TOML_FILE, Resolved, Setting, all_settings, choices, find_setting, resolve


def show(*, changed: bool = False, json: Json = False) -> int:
    """Show every setting with its value and where that comes from: environment, backpropagate.toml or default.

    Parameters
    ----------
    changed: bool
        Only those that are not at their default.
    """
    found = _resolve()
    rows = [s for s in all_settings().values() if not changed or found.sources[s.key] != "default"]
    if json:
        print_json("config-show", {"file": _file(), "settings": [_row(s, found) for s in rows]})
        return 0
    width = max((len(s.key) for s in rows), default=0)
    for setting in rows:
        value, source = found.settings.to_flat()[setting.key], found.sources[setting.key]
        print(f"  {setting.key.ljust(width)}  {_words(value)}{'' if source == 'default' else f'  ({source})'}")  # noqa: T201
    print(f"\n  file      {_file() or f'none; a {TOML_FILE} in this folder would be read'}")  # noqa: T201
    print("  next      backprop config explain lora.r")  # noqa: T201
    return 0


def explain(key: Annotated[str, Parameter(allow_leading_hyphen=True)], *, json: Json = False) -> int:
    """Explain one setting: its value, where that comes from, its default, and its name as flag, variable and in TOML.

    Parameters
    ----------
    key: str
        The setting by any of its names: lora.r, --lora-r, lora_r, BACKPROPAGATE_LORA__R.
    """
    setting, found = find_setting(key), _resolve()
    if json:
        print_json("config-explain", _row(setting, found))
        return 0
    value, source = found.settings.to_flat()[setting.key], found.sources[setting.key]
    group, name = setting.key.split(".")
    example = setting.default if value is None else value
    lines = [
        f"{setting.key}: {setting.help}",
        f"  value     {_words(value)}  (from: {source})",
        f"  default   {_words(setting.default)}",
        f"  takes     {', '.join(choices(setting)) or _kind(setting)}",
        f"  flag      {' or '.join(flag_names(setting))}",
        f"  variable  {setting.env}",
        f"  file      {TOML_FILE}: [{group}] {name} = {_toml(example)}",
    ]
    print("\n".join(lines))  # noqa: T201
    return 0


def _resolve() -> Resolved:
    return resolve({}, os.environ, Path(TOML_FILE))


def _file() -> str | None:
    file = Path(TOML_FILE)
    return str(file.resolve()) if file.is_file() else None


def _row(setting: Setting, found: Resolved) -> dict[str, Any]:
    return {
        "key": setting.key,
        "value": found.settings.to_flat()[setting.key],
        "source": found.sources[setting.key],
        "default": setting.default,
        "help": setting.help,
        "choices": list(choices(setting)),
        "flags": list(flag_names(setting)),
        "variable": setting.env,
    }


def _words(value: Any) -> str:
    if value is None or value in ("", ()):
        return "not set"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else spell(value)


def _kind(setting: Setting) -> str:
    named = {"int": "a whole number", "float": "a number", "bool": "true or false", "tuple": "texts", "str": "text"}
    return next((words for kind, words in named.items() if kind in str(setting.type)), "text")


def _toml(value: Any) -> str:
    if value is None:
        return "…"
    if isinstance(value, bool | int | float):
        return spell(value)
    return str([str(v) for v in value]) if isinstance(value, tuple) else f'"{value}"'
