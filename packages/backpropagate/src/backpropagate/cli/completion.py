"""`backprop --install-completion`: the shell completes commands, flags and choices."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

from backpropagate.errors import ShellUnknownError

Shell: TypeAlias = Literal["bash", "zsh", "fish", "powershell"]


def install_completion(shell: Shell | None = None, *, output: Path | None = None) -> int:
    """Let your shell complete commands, flags and choices.

    Parameters
    ----------
    shell: str
        The shell; default: the one that this was typed in.
    output: Path
        File to write; default: where the shell looks, and a line in its start-up file.
    """
    from cyclopts.completion import detect_shell
    from cyclopts.completion.detect import ShellDetectionError

    from backpropagate.cli.app import build_app

    try:
        chosen = shell or detect_shell()
    except ShellDetectionError as error:
        raise ShellUnknownError("it is not clear which shell this is") from error
    file = build_app().install_completion(shell=chosen, output=output, add_to_startup=output is None)
    print(f"  written   {file}")  # noqa: T201
    print(f"  next      start a new {chosen}, then type: backprop tr<TAB>")  # noqa: T201
    return 0
