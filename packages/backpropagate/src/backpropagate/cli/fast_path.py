"""Commands that answer at once: `--version`, `backprop` alone, `list-runs` and `show-run`.

Importing the parser, cyclopts, and the settings takes several times the work of these commands. So plain command lines
are read here, without both. Whatever is not plain is left to `backpropagate.cli.app`, which reads the same words again:
an unknown flag, a value that is wrong, an error, a setting in the environment or in a file, several ranks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

_OUTPUT = dict.fromkeys(("--output", "-o", "--output-dir"), ("output", str))
_JSON = {"--json": ("json", bool)}
STATUSES = ("running", "completed", "stopped", "failed", "diverged", "interrupted")
FLAGS: Mapping[str, Mapping[str, tuple[str, Any]]] = {
    "list-runs": {
        **_OUTPUT,
        **_JSON,
        "--status": ("status", STATUSES),
        "--tag": ("tag", str),
        "--limit": ("limit", int),
    },
    "show-run": {**_OUTPUT, **_JSON},
}
"""By command and flag: the keyword, and what it takes: text, a number, one of some words, or nothing (bool)."""
RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
"""Variables by which launchers tell a process its rank, see `backpropagate.distributed.launchers`."""


def answer(argv: Sequence[str], environ: Mapping[str, str]) -> int | None:
    """Answer a plain command line and return its exit status; None: it is not one, and nothing was printed."""
    if list(argv) in (["--version"], ["-V"]):
        from backpropagate import __version__

        print(__version__)  # noqa: T201
        return 0
    if not _is_plain(environ):
        return None
    found = read(argv)
    return None if found is None else _answer_utf8(found)


def _is_plain(environ: Mapping[str, str]) -> bool:
    """Whether no setting comes from elsewhere, and no launcher started this process."""
    settings = any(name.startswith("BACKPROPAGATE_") and name != "BACKPROPAGATE_HOME" for name in environ)
    return not (settings or any(name in environ for name in RANKS) or os.path.exists("backpropagate.toml"))  # noqa: PTH110  # pathlib is not loaded yet


def read(argv: Sequence[str]) -> dict[str, Any] | None:
    """The command and its keywords; None where the words are not plain."""
    if not argv:
        return {"command": ""}
    command, *words = argv
    flags = FLAGS.get(command)
    if flags is None:
        return None
    found: dict[str, Any] = {"command": command}
    rest = iter(words)
    taken: str | int | None
    for word in rest:
        flag, joined, value = word.partition("=")
        if not word.startswith("-"):
            name = "run"
            taken = word if command == "show-run" else None
        else:
            name, kind = flags.get(flag, ("", None))
            taken = _value(kind, value if joined else None, rest)
        if taken is None or name in found:
            return None
        found[name] = taken
    return found


def _value(kind: Any, joined: str | None, rest: Any) -> str | int | Literal[True] | None:
    if kind is bool:
        return True if joined is None else None
    word = next(rest, "") if joined is None else joined
    if not word or word.startswith("-"):
        return None
    if kind is int:
        return int(word) if word.isascii() and word.isdigit() else None
    return word if kind is str or (isinstance(kind, tuple) and word in kind) else None


def _answer_utf8(found: dict[str, Any]) -> int | None:
    from backpropagate.cli.hint_wording import CommandLineWording
    from bp_runs.errors import CodedError
    from bp_runs.wording import use_wording

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    try:
        with use_wording(CommandLineWording()):
            status = _run(**found)
            sys.stdout.flush()
            return status
    except CodedError:
        return None  # told by `app`; these commands print only when they have succeeded
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def _run(command: str, output: str = "./output", json: bool = False, run: str | None = None, **filters: Any) -> int:
    from backpropagate.system import to_path

    folder = to_path(output)
    if command == "list-runs":
        from backpropagate.cli.list_runs import print_list

        return print_list(folder, json=json, **{"status": None, "tag": None, "limit": 20, **filters})
    if command == "show-run":
        from backpropagate.cli.show_run import print_run

        return print_run(folder, run, json=json)
    from backpropagate.cli.next_steps import print_next_steps

    return print_next_steps(folder)
