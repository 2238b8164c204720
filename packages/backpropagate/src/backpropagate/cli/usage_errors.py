"""Command lines that cannot be understood, as coded errors that say what was wrong in the words that were typed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, get_args

from cyclopts import (
    CoercionError,
    CycloptsError,
    MissingArgumentError,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
)

from backpropagate import legacy_names
from backpropagate.cli.global_flags import SWITCHES
from backpropagate.errors import CommandLineError, OldNameError
from backpropagate.suggestions import nearest
from bp_runs.errors import CodedError
from bp_runs.spec import choices_of

_KINDS = {int: "a whole number", float: "a number", bool: "no value, or true or false"}


def explain(error: CycloptsError, commands: Sequence[str]) -> CodedError:
    """What cyclopts rejected, in our words.

    Args:
        commands: All command names; two words for those of a group.
    """
    chain = tuple(error.command_chain or ())
    command = " ".join(("backprop", *chain))
    fix = f"See what it takes: {command} --help"
    match error:
        case UnknownCommandError(unused_tokens=[word, *_]):
            return _unknown_command(chain, word, commands)
        case UnknownOptionError():
            return _unknown_flag(error, chain, fix)
        case UnusedCliTokensError(unused_tokens=[_, *_]):
            words = " ".join(map(repr, error.unused_tokens or ()))
            return CommandLineError(f"{command} does not take {words}", fix=fix)
        case MissingArgumentError():
            return CommandLineError(_missing(error, command), fix=fix)
        case CoercionError():
            return _wrong_value(error, fix)
    return CommandLineError(" ".join(str(error).split()).rstrip("."), fix=fix)


def _unknown_flag(error: UnknownOptionError, chain: Sequence[str], fix: str) -> CodedError:
    flag = (error.token.keyword or error.token.value).partition("=")[0]
    if chain and (old := legacy_names.find_flag(" ".join(chain), flag)):
        return OldNameError(f"backprop {' '.join(chain)} {flag} was removed", cause=old.why, fix=old.now)
    known = {name for argument in error.argument_collection if argument.parse for name in argument.names}
    known |= {switch.flag for switch in SWITCHES}
    return CommandLineError(f"unknown flag {flag}{nearest(flag, known)}", fix=fix)


def _missing(error: MissingArgumentError, command: str) -> str:
    argument = error.argument
    if argument is None:
        return f"{command} needs another argument"
    if error.keyword:
        return f"{error.keyword} needs a value"
    if argument.index is not None:
        return f"{command} needs {argument.field_info.name.upper()}"
    return f"{command} needs {argument.names[0]}"


def _wrong_value(error: CoercionError, fix: str) -> CommandLineError:
    argument, token = error.argument, error.token
    name = (token.keyword if token is not None else None) or (argument.names[0] if argument is not None else "a value")
    value = "" if token is None else f": {token.value!r}"
    kind = None if argument is None else argument.field_info.annotation
    parts = (kind, *get_args(kind), *(inner for part in get_args(kind) for inner in get_args(part)))
    choices = list(dict.fromkeys(str(choice) for part in parts for choice in choices_of(part)))
    near = nearest(token.value, choices) if token is not None else ""
    return CommandLineError(f"invalid value for {name}{value}{near}", cause=_expected(parts, choices), fix=fix)


def _expected(parts: Iterable[Any], choices: Sequence[str]) -> str | None:
    """What a parameter's type takes, in words; None if there are none for it."""
    if choices:
        return f"it must be one of: {', '.join(choices)}"
    return next((f"it must be {_KINDS[part]}" for part in parts if isinstance(part, type) and part in _KINDS), None)


def _unknown_command(chain: Sequence[str], word: str, commands: Iterable[str]) -> CodedError:
    typed = " ".join((*chain, word))
    if old := legacy_names.find_command(typed):
        return OldNameError(f"backprop {typed} was removed", cause=old.why, fix=old.now)
    if chain and (old := legacy_names.find_flag(" ".join(chain), word)):
        return OldNameError(f"backprop {' '.join(chain)} {word} was removed", cause=old.why, fix=old.now)
    depth = len(chain)
    known = {name.split()[depth] for name in commands if name.split()[:depth] == list(chain) and name != typed}
    if not chain:
        known |= set(commands)
    if word.startswith("-"):
        known = {switch.flag for switch in SWITCHES} | {"--help", "--version"}
    fix = f"See the commands: backprop {' '.join((*chain, '--help'))}"
    return CommandLineError(f"there is no command {typed!r}{nearest(word, known)}", fix=fix)
