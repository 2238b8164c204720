"""Hints in the words of ``bp-export``: its own options as flags, its own commands as they are typed."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from bp_export.cli.options import Option, find_option
from bp_runs.wording import PlainWording, Settings

_COMMANDS = frozenset({"chat", "imatrix", "ollama", "push"})


def spell_option(key: str, value: str | None) -> str:
    """A keyword of this package as a flag: ``--force``, ``--no-verify``, ``--split-mib 2048``."""
    option = find_option(key) or Option(key)
    if value is None or value == "true":
        return option.long
    if value == "false":
        return f"--no-{option.long.removeprefix('--')}"
    return f"{option.long} {shlex.quote(value if option.factor == 1 else str(int(value) // option.factor))}"


class ExportWording(PlainWording):
    """What can be typed after ``bp-export``; settings and commands of training are named plainly."""

    def settings(self, settings: Settings) -> str:
        """``--format gguf --quantization q4_k_m``."""
        if any("." in key for key in settings):
            return super().settings(settings)
        return " ".join(spell_option(key, value) for key, value in settings.items())

    def command(self, words: Sequence[str], settings: Settings) -> str:
        """``bp-export ./output/lora --format merged``, ``bp-export imatrix MODEL.gguf --text TEXT``."""
        if words[0] not in {"export", *_COMMANDS}:
            return super().command(words, settings)
        typed = words[1:] if words[0] == "export" else words
        return " ".join(["bp-export", *map(shlex.quote, typed), *(spell_option(*pair) for pair in settings.items())])
