"""``bp-export chat``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bp_export.cli.options import CHAT
from bp_export.cli.output import add_options, find_progress, tell, tell_json

if TYPE_CHECKING:
    from bp_export.chat.session import ChatSession


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="bp-export chat",
        description="Chat with an adapter, a model folder, a GGUF or a model in Ollama.",
        epilog="At the prompt, /help shows the commands.",
    )
    parser.add_argument("target", help="a GGUF, an adapter or model folder; with --ollama a model's name there")
    add_options(parser, CHAT)
    return parser


def run(options: argparse.Namespace) -> int:
    """Ask once, or converse."""
    from bp_export.chat.conversation import converse
    from bp_export.chat.session import ChatOptions, ask_once  # NumPy only after --help

    if options.json and options.prompt is None:
        build_parser().error("--json needs --prompt")
    manner = ChatOptions(options.system, options.max_tokens, options.temperature, options.seed)
    with _open(options) as talk:
        if options.prompt is None:
            print(f"chat template: {talk.rendering.note}", file=sys.stderr)  # noqa: T201
            converse(talk, manner, lambda: input("> " if sys.stdin.isatty() else ""), _write)
        elif options.json:
            answer = "".join(ask_once(talk, options.prompt, manner))
            document = {"target": options.target, "answer": answer, "rendering": dataclasses.asdict(talk.rendering)}
            tell_json(document)
        else:
            for piece in ask_once(talk, options.prompt, manner):
                _write(piece)
            tell("")
    return 0


@contextlib.contextmanager
def _open(options: argparse.Namespace) -> Iterator[ChatSession]:
    from bp_export.chat.session import OllamaSession, open_session

    if options.ollama:
        yield OllamaSession(options.target, options.ollama_host)
        return
    with open_session(
        Path(options.target),
        base=options.base,
        context=options.context,
        quantization=options.quantization,
        dequantize=options.dequantize,
        progress=find_progress(as_json=options.json),
    ) as talk:
        yield talk


def _write(piece: str) -> None:
    print(piece, end="", flush=True)  # noqa: T201
