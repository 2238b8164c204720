"""`backprop config`: what the settings are, where each comes from, and how to set one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from backpropagate.cli.flags import Json, flag_names, spell
from backpropagate.cli.output import print_json
from backpropagate.settings import (
    TOML_FILE,
    Setting,
    Source,
    all_settings,
    choices,
    find_setting,
    kind_of,
    resolve,
    resolve_ui,
    ui_settings,
)
from bp_runs.redact import MASK


def show(*, changed: bool = False, json: Json = False) -> int:
    """Show every setting with its value and where that comes from: environment, backpropagate.toml or default.

    Parameters
    ----------
    changed: bool
        Only those that are not at their default.
    """
    found = _resolve()
    known = (*all_settings().values(), *ui_settings().values())
    rows = [s for s in known if not changed or found[s.key][1] != "default"]
    if json:
        print_json("config-show", {"file": _file(), "settings": [_row(s, found) for s in rows]})
        return 0
    width = max((len(s.key) for s in rows), default=0)
    for setting in rows:
        value, source = found[setting.key]
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
    value, source = found[setting.key]
    group, name = setting.key.split(".")
    example = setting.default if value is None else value
    lines = [
        f"{setting.key}: {setting.help}",
        f"  value     {_words(value)}  (from: {source})",
        f"  default   {_words(setting.default)}",
        f"  takes     {', '.join(choices(setting)) or kind_of(setting)}",
        f"  flag      {' or '.join(flag_names(setting))}",
        f"  variable  {setting.env}",
        f"  file      {TOML_FILE}: [{group}] {name} = {_toml(example)}",
    ]
    print("\n".join(lines))  # noqa: T201
    return 0


def _resolve() -> dict[str, tuple[Any, Source]]:
    """Every setting's value and source by key; a secret is masked."""
    found = resolve({}, os.environ, Path(TOML_FILE))
    page, sources = resolve_ui({}, os.environ, Path(TOML_FILE))
    told = {key: (value, found.sources[key]) for key, value in found.settings.to_flat().items()}
    for setting in ui_settings().values():
        value = getattr(page, setting.key.partition(".")[2])
        told[setting.key] = (MASK if setting.is_secret and value else value, sources[setting.key])
    return told


def _file() -> str | None:
    file = Path(TOML_FILE)
    return str(file.resolve()) if file.is_file() else None


def _row(setting: Setting, found: dict[str, tuple[Any, Source]]) -> dict[str, Any]:
    value, source = found[setting.key]
    return {
        "key": setting.key,
        "value": value,
        "source": source,
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


def _toml(value: Any) -> str:
    if value is None:
        return "…"
    if isinstance(value, bool | int | float):
        return spell(value)
    return str([str(v) for v in value]) if isinstance(value, tuple) else f'"{value}"'
