"""``bp-export``: the command line of this package alone; ``backprop`` is the larger one."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, MappingProxyType, ModuleType
from typing import NoReturn

from bp_export.cli.output import tell_error
from bp_export.cli.wording import ExportWording
from bp_export.hub.cache import use_cache
from bp_export.llama_cpp.environment import use_environment
from bp_runs.errors import CodedError
from bp_runs.wording import use_wording

_INTERRUPTED = 130
_TRUTHS = ("1", "true", "yes", "on")
# By first word; anything else is the path of what is to be exported.
COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "ollama": "register a GGUF or an adapter with Ollama, list its models, take one away",
        "chat": "talk to an adapter, a model folder, a GGUF or a model in Ollama",
        "push": "upload an adapter, a model folder or a GGUF to the Hub with a model card",
        "imatrix": "measure an importance matrix on a text, for --imatrix",
    }
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 1 the user's input, 2 the rest, 3 not verified, 130 interrupted."""
    if arguments is None:
        for number in _stop_signals():
            signal.signal(number, _raise_interrupt)  # so that half-written files are cleared as on Ctrl-C
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = words.pop(0) if words[:1] and words[0] in COMMANDS else "export"
    command = importlib.import_module(f"bp_export.cli.{name}")
    options = command.build_parser().parse_args(words)
    with (
        use_wording(ExportWording()),
        use_cache(_find_hub_cache(os.environ)),
        use_environment(_find_home(os.environ) / "llama.cpp", is_offline=_is_offline(os.environ), notice=_print_notice),
    ):
        return _carry_out(command, options)


def _find_hub_cache(environ: Mapping[str, str]) -> Path | None:
    """Where huggingface_hub keeps models, by its own variables; None for its default."""
    if folder := environ.get("HF_HUB_CACHE"):
        return Path(folder).expanduser()
    if home := environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    return Path(home).expanduser() / "huggingface" / "hub" if (home := environ.get("XDG_CACHE_HOME")) else None


def _find_home(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("BACKPROPAGATE_HOME") or "~/.backpropagate").expanduser()


def _is_offline(environ: Mapping[str, str]) -> bool:
    return any(environ.get(name, "").lower() in _TRUTHS for name in ("BACKPROPAGATE_OFFLINE", "HF_HUB_OFFLINE"))


def _print_notice(text: str) -> None:
    print(text, file=sys.stderr)  # noqa: T201


def _carry_out(command: ModuleType, options: argparse.Namespace) -> int:
    try:
        return int(command.run(options))
    except CodedError as error:
        tell_error(error, as_json=options.json)
        return error.exit_status
    except BrokenPipeError:  # what reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("Interrupted; nothing was left behind.", file=sys.stderr)  # noqa: T201
        return _INTERRUPTED


def _stop_signals() -> list[signal.Signals]:
    """SIGTERM, and SIGHUP where the system has it and it is not ignored, as under ``nohup``."""
    hangup = getattr(signal, "SIGHUP", None)
    return [signal.SIGTERM, *([hangup] if hangup and signal.getsignal(hangup) is not signal.SIG_IGN else [])]


def _raise_interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
