"""Flags that every command takes, before or after its name: they set up the program, not the work."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from backpropagate.errors import CommandLineError

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
FORMATS: tuple[Literal["console", "json"], ...] = ("console", "json")


@dataclass(frozen=True, slots=True)
class Switch:
    """One flag and the environment variable that it stands for."""

    flag: str
    env: str
    help: str
    value: str | None = None
    """What it sets; None where the next word is the value."""
    choices: tuple[str, ...] = ()


SWITCHES = (
    Switch("--offline", "BACKPROPAGATE_OFFLINE", "Use no network: models and data must be here or cached.", "1"),
    Switch("--verbose", "BACKPROPAGATE_LOG_LEVEL", "Log what is done, to stderr (-v).", "INFO"),
    Switch("--log-level", "BACKPROPAGATE_LOG_LEVEL", "DEBUG, INFO, WARNING or ERROR.", choices=LEVELS),
    Switch("--log-format", "BACKPROPAGATE_LOG_FORMAT", "console, or json for one object a line.", choices=FORMATS),
    Switch("--log-file", "BACKPROPAGATE_LOG_FILE", "Log to this file as well, as JSON lines."),
)
_BY_FLAG = {switch.flag: switch for switch in SWITCHES} | {"-v": SWITCHES[1]}


@dataclass(frozen=True, slots=True)
class CommandLine:
    """A command line without its switches."""

    argv: tuple[str, ...]
    environ: Mapping[str, str] = field(default_factory=dict)
    """Variables that the switches set."""


def take_switches(argv: Sequence[str]) -> CommandLine:
    """Part the switches from the command; words after ``--`` are left alone.

    Raises:
        CommandLineError: A switch without its value, or with one that it cannot take.
    """
    rest: list[str] = []
    environ: dict[str, str] = {}
    words = iter(argv)
    for word in words:
        if word == "--":
            return CommandLine((*rest, word, *words), environ)
        flag, joined, value = word.partition("=")
        switch = _BY_FLAG.get(flag)
        if switch is None:
            rest.append(word)
        elif switch.value is not None and not joined:
            environ[switch.env] = switch.value
        else:
            environ[switch.env] = _read(switch, value if joined else next(words, None))
    return CommandLine(tuple(rest), environ)


def _read(switch: Switch, value: str | None) -> str:
    if switch.value is not None:
        raise CommandLineError(f"{switch.flag} takes no value")
    if not value or value.startswith("--"):
        raise CommandLineError(f"{switch.flag} needs a value", fix=f"Give it a value: {switch.help}")
    if switch.choices and value.upper() not in {choice.upper() for choice in switch.choices}:
        raise CommandLineError(f"invalid value for {switch.flag}: {value!r}", fix=f"Give it a value: {switch.help}")
    return value


@contextmanager
def environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Let the process see ``changes`` in its environment while the context lasts."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def overview() -> str:
    """The switches as the epilogue of the overview."""
    width = max(len(_spell(switch)) for switch in SWITCHES)
    return "\n".join(f"  {_spell(switch).ljust(width)}  {switch.help}" for switch in SWITCHES)


def _spell(switch: Switch) -> str:
    return switch.flag if switch.value is not None else f"{switch.flag} {'PATH' if 'file' in switch.flag else 'WORD'}"
