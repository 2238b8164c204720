"""Command signatures made from the settings, so that every setting is a flag and no flag does nothing."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from backpropagate.settings import TOML_FILE, Setting, all_settings, resolve
from backpropagate.system import to_path

# Further spellings that people type.
_ALIASES: Mapping[str, tuple[str, ...]] = {
    "model.name": ("-m",),
    "data.path": ("-d",),
    "training.output_dir": ("-o",),
    "training.learning_rate": ("--learning-rate",),
    "training.sample_prompts": ("--sample-prompt",),
    # As the older tool spelled them.
    "lora.use_dora": ("--use-dora",),
    "lora.use_rslora": ("--use-rslora",),
}

Json = Annotated[
    bool, Parameter(name="--json", negative="", show_default=False, help="Print one JSON document and nothing else.")
]
Output = Annotated[
    str | None,
    Parameter(name=("--output", "-o"), help="Output folder that holds the runs; default: the setting, ./output."),
]


def output_folder(flag: str | None) -> Path:
    """The output folder: the flag, else the setting ``training.output_dir``."""
    wanted = resolve({"output": flag}, os.environ, Path(TOML_FILE)).settings
    return to_path(wanted.training.output_dir)


def with_settings(
    command: Callable[..., int], *, leave_out: Sequence[str] = (), extra: Sequence[inspect.Parameter] = ()
) -> Callable[..., int]:
    """Give ``command(**flags)`` a keyword for every setting; a flag that is not typed arrives as None."""
    chosen = [s for s in all_settings().values() if s.key not in leave_out]
    parameters = [_parameter(s) for s in chosen] + list(extra)
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    """A keyword-only parameter for `with_settings`."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _parameter(setting: Setting) -> inspect.Parameter:
    flag = "--sample-prompt" if setting.key == "training.sample_prompts" else "--" + setting.short.replace("_", "-")
    names = (flag, *(a for a in _ALIASES.get(setting.key, ()) if a != flag))
    kind: Any = list[str] if setting.key == "training.sample_prompts" else setting.type
    shown = "" if setting.default in (None, "", ()) else f" [default: {_spell(setting.default)}]"
    annotation: Any = Annotated[
        kind | None, Parameter(name=names, help=setting.help + shown, show_default=False, negative_iterable="")
    ]
    return keyword(setting.short, annotation, None)


def _spell(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
