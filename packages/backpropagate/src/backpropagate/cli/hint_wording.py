"""Hints in the words of the command line: ``--on-bad-row skip``, ``backprop list-runs --output ./out``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

from bp_runs.wording import Settings

if TYPE_CHECKING:
    from backpropagate.settings import Setting


_OVERRIDING = frozenset({"replay"})
"""Commands that take settings as ``--override lora.r=8``."""


def flag_of(key: str) -> str:
    """The flag of a setting, by its dotted key, or of a command's own keyword: ``--lora-r``, ``--force``."""
    from backpropagate.cli.flags import flag_names

    known = _setting(key)
    return _spell(key, None) if known is None else flag_names(known)[0]


def _setting(key: str) -> Setting | None:
    from backpropagate.settings import all_settings, ui_settings

    return all_settings().get(key) or ui_settings().get(key)


def command_line(name: str, *words: object, **options: object) -> str:
    """A command to paste, of values: ``backprop show-run 20261123 --output ./out``."""
    flags = (f"--{key.replace('_', '-')} {shlex.quote(str(value))}" for key, value in options.items())
    return " ".join(["backprop", name, *(shlex.quote(str(word)) for word in words), *flags])


class CommandLineWording:
    """What can be typed after ``backprop``."""

    def settings(self, settings: Settings) -> str:
        """``--lora-r 8 --no-packing``."""
        return " ".join(_flag(key, value) for key, value in settings.items())

    def command(self, words: Sequence[str], settings: Settings) -> str:
        """``backprop show-run 20261123 --output ./out``."""
        spell = _override if words[0] in _OVERRIDING else _flag
        return " ".join(["backprop", *map(_word, words), *(spell(key, value) for key, value in settings.items())])

    def program(self, words: Sequence[str], settings: Settings) -> str:
        """``-m backpropagate resume 20261123``."""
        return f"-m backpropagate {self.command(words, settings).removeprefix('backprop ')}"

    def install(self, words: Sequence[str]) -> str:
        """``pip install …``, ``pipx inject backpropagate …``: as this environment needs it."""
        from backpropagate.installation import install_command  # a list of runs installs nothing

        return install_command(words)


def _spell(key: str, value: str | None) -> str:
    """An option of a command, by its keyword; imported late, since the help needs none."""
    from bp_export.cli.wording import spell_option

    return spell_option(key, value)


def _override(key: str, value: str | None) -> str:
    return f"--override {_word(f'{key}={value}')}" if "." in key else _flag(key, value)


def _flag(key: str, value: str | None) -> str:
    if "." not in key:
        return _spell(key, value)
    flag = flag_of(key)
    if value is None or (value == "true" and _is_switch(key)):
        return flag
    if value == "false" and _is_switch(key):
        return f"--no-{flag.removeprefix('--')}"
    return f"{flag} {_word(value)}"


def _is_switch(key: str) -> bool:
    known = _setting(key)
    return known is None or bool in (known.type, *get_args(known.type))


def _word(value: str) -> str:
    return value if value == "…" else shlex.quote(value)
