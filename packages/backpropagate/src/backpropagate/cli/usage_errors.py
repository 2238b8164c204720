"""Command lines that cannot be understood, as coded errors that name what was probably meant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cyclopts import CycloptsError, UnknownCommandError, UnknownOptionError

from backpropagate import legacy_names
from backpropagate.cli.global_flags import SWITCHES
from backpropagate.errors import CommandLineError, OldNameError
from backpropagate.settings import nearest
from bp_runs.errors import CodedError


def explain(error: CycloptsError, commands: Sequence[str]) -> CodedError:
    """What cyclopts refused, in our words.

    Args:
        commands: All command names; two words for those of a group.
    """
    chain = tuple(error.command_chain or ())
    if isinstance(error, UnknownCommandError) and error.unused_tokens:
        return _unknown_command(chain, error.unused_tokens[0], commands)
    fix = f"See what it takes: backprop {' '.join((*chain, '--help'))}"
    if isinstance(error, UnknownOptionError):
        flag = (error.token.keyword or error.token.value).partition("=")[0]
        if chain and (old := legacy_names.find_flag(" ".join(chain), flag)):
            return OldNameError(f"backprop {' '.join(chain)} has no {flag} any more", cause=old.why, fix=old.now)
        known = {name for argument in error.argument_collection if argument.parse for name in argument.names}
        known |= {switch.flag for switch in SWITCHES}
        return CommandLineError(f"unknown flag {flag}{nearest(flag, known)}", fix=fix)
    return CommandLineError(" ".join(str(error).split()).rstrip("."), fix=fix)


def _unknown_command(chain: Sequence[str], word: str, commands: Iterable[str]) -> CodedError:
    typed = " ".join((*chain, word))
    if old := legacy_names.find_command(typed):
        return OldNameError(f"backprop {typed} is no command any more", cause=old.why, fix=old.now)
    if chain and (old := legacy_names.find_flag(" ".join(chain), word)):
        return OldNameError(f"backprop {' '.join(chain)} has no {word} any more", cause=old.why, fix=old.now)
    depth = len(chain)
    known = {name.split()[depth] for name in commands if name.split()[:depth] == list(chain) and name != typed}
    if word.startswith("-"):
        known = {switch.flag for switch in SWITCHES} | {"--help", "--version"}
    fix = f"See the commands: backprop {' '.join((*chain, '--help'))}"
    return CommandLineError(f"there is no command {typed!r}{nearest(word, known)}", fix=fix)
