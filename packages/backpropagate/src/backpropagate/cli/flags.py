"""Command signatures made from the settings, so that every setting is a flag and no flag does nothing."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import GenericAlias, MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter

from backpropagate.errors import CommandLineError
from backpropagate.settings import TAKES_AUTO, TOML_FILE, Setting, all_settings, choices, resolve, ui_settings
from backpropagate.system import to_path

if TYPE_CHECKING:
    from cyclopts.help import HelpPanel
    from rich.console import Console, ConsoleOptions

    from bp_export.cli.options import Option


_LETTERS: Mapping[str, str] = {
    "model.name": "-m",
    "data.path": "-d",
    "training.output_dir": "-o",
    "ui.output": "-o",
    "ui.port": "-p",
}
# Flags whose usual spelling is not the Python keyword.
_USUAL: Mapping[str, str] = {"training.start_from": "--from", "training.sample_prompts": "--sample-prompt"}


def flag_names(setting: Setting) -> tuple[str, ...]:
    """How the setting is spelled as a flag, the usual spelling first."""
    usual = _USUAL.get(setting.key) or _to_flag(setting.short)
    letter = (_LETTERS[setting.key],) if setting.key in _LETTERS else ()
    return tuple(dict.fromkeys((usual, *letter, *map(_to_flag, setting.words))))


def _to_flag(word: str) -> str:
    return "--" + word.replace("_", "-")


Json = Annotated[
    bool, Parameter(name="--json", negative="", show_default=False, help="Print one JSON document and nothing else.")
]
Output = Annotated[
    str | None,
    Parameter(
        name=flag_names(all_settings()["training.output_dir"]),
        help="Output folder that holds the runs; default: the setting, ./output.",
    ),
]


MULTI_RUN = tuple(key for key in all_settings() if key.startswith("multirun."))
"""Settings that only `backprop multi-run` looks at."""


def output_folder(flag: str | None) -> Path:
    """The output folder: the flag, else the setting ``training.output_dir``."""
    wanted = resolve({"output": flag}, os.environ, Path(TOML_FILE)).settings
    return to_path(wanted.training.output_dir)


def with_settings(
    command: Callable[..., int],
    *,
    known: Mapping[str, Setting] | None = None,
    leave_out: Sequence[str] = (),
    extra: Sequence[inspect.Parameter] = (),
) -> Callable[..., int]:
    """Give ``command(**flags)`` a keyword for every setting; a flag that is not typed arrives as None.

    Args:
        known: The settings; default: those of a run.
        leave_out: Keys of those that the command does not look at.
        extra: Further parameters.
    """
    chosen = [s for s in (known or all_settings()).values() if s.key not in leave_out]
    parameters = sorted([*(_parameter(s) for s in chosen), *extra], key=lambda parameter: parameter.kind)
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


FILE = inspect.Parameter(
    "file",
    inspect.Parameter.POSITIONAL_ONLY,
    default=None,
    annotation=Annotated[str | None, Parameter(help="The data, as --data.", show_default=False)],
)
"""The data as a word of its own: ``backprop train my_data.jsonl``."""


def join_data(file: str | None, flags: dict[str, Any]) -> dict[str, Any]:
    """The flags of a command with the data that was named without a flag.

    Raises:
        CommandLineError: The flag names other data.
    """
    other = flags.get("data")
    if file is None or file == other:
        return flags
    if other is not None:
        raise CommandLineError(f"the data is named twice: {file} and --data {other}", fix="Name it once.")
    return {**flags, "data": file}


def keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    """A keyword-only parameter for `with_settings`."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _parameter(setting: Setting) -> inspect.Parameter:
    kind: Any = setting.type
    if "tuple" in str(kind):
        kind = GenericAlias(list, (Literal[choices(setting)],)) if choices(setting) else list[str]
    if setting.key in TAKES_AUTO:
        kind = kind | Literal["auto"]
    shown = "" if setting.default in (None, "", ()) else f" [default: {spell(setting.default)}]"
    annotation: Any = Annotated[
        kind | None,
        Parameter(
            name=flag_names(setting),
            help=setting.help + shown,
            show_default=False,
            negative_iterable="",
            negative=f"--no-{flag_names(setting)[0].removeprefix('--')}" if setting.type is bool else None,
            group=_group(setting.key.partition(".")[0]),
        ),
    ]
    return keyword(setting.short, annotation, None)


@cache
def _group(name: str) -> Group:
    """The panel of the help page that a group's flags are in, in the order of the settings."""
    names = list(dict.fromkeys(key.partition(".")[0] for key in (*all_settings(), *ui_settings())))
    title = {"lora": "LoRA", "multirun": "Multi-run", "ui": "Web page"}.get(name, name.capitalize())
    return Group(title, sort_key=names.index(name), help_formatter=show_usual_names)


def spell(value: Any) -> str:
    """A setting's value as it is typed."""
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


_COMMON = "--model --data --samples --max-seq-length --mode --steps --lr --batch-size --lora-r --output --resume"
COMMON_FLAGS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "train": frozenset(f"{_COMMON} --method --epochs --packing --from".split()),
        "multi-run": frozenset(f"{_COMMON} --runs --merge --replay-share --eval-gate".split()),
    }
)
"""Flags that the help of a command shows first; ``--help-all`` shows every one."""

_hidden: set[str] = set()
"""Flags that the page of help which is printed next leaves out."""


def show_only(flags: Collection[str] | None) -> None:
    """Let the help that this process prints next leave out other flags of settings; None: none."""
    _hidden.clear()
    if flags is not None:
        _hidden.update(flag_names(setting)[0] for setting in all_settings().values())
        _hidden.difference_update(flags)


def show_usual_names(console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
    """Print a panel of the help with one spelling per flag; `backprop config explain` lists the others."""
    from cyclopts.help import DefaultFormatter

    chosen = [entry.copy(positive_names=entry.positive_names[:1]) for entry in panel.entries]
    chosen = [entry for entry in chosen if not _hidden.intersection(entry.positive_names)]
    if chosen:
        DefaultFormatter()(console, options, panel.copy(entries=chosen))


def with_options(command: Callable[..., int], options: Sequence[Option]) -> Callable[..., int]:
    """Give ``command(…, **typed)`` a keyword for each declared option, next to the parameters that it has.

    Args:
        command: Takes the options as keywords, as they are typed; see `bp_export.cli.options.read_values`.
        options: Declared once for both command lines.
    """
    own = inspect.signature(command, eval_str=True).parameters.values()
    kept = [parameter for parameter in own if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    keywords = [keyword(option.name, _annotate(option), option.default) for option in options]
    required = inspect.Parameter.empty
    keywords = [p.replace(default=required) if o.is_required else p for p, o in zip(keywords, options, strict=True)]
    parameters = sorted([*kept, *keywords], key=lambda p: (p.kind, p.name == "json"))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _annotate(option: Option) -> Any:
    kind: Any = Literal[option.choices] if option.choices else option.kind
    optional = option.default is None and not option.is_required and (option.has_negative or not option.is_switch)
    parameter = Parameter(
        name=option.words,
        help=_to_sentence(option.help),
        negative=None if option.has_negative else "",
        show_default=option.default is not None and not option.is_switch,
    )
    return Annotated[kind | None if optional else kind, parameter]


def _to_sentence(help: str) -> str:
    """Begins with a capital, unless the first word is a name such as ``gguf:`` or ``llama.cpp's``."""
    first = help.split(" ", 1)[0]
    return (help[:1].upper() + help[1:] if first.replace("'", "").isalpha() else help) + "."
