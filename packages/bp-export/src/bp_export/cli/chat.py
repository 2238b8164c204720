"""``bp-export chat``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bp_export.cli.output import add_json_flag, find_progress, tell, tell_json

if TYPE_CHECKING:
    from bp_export.chat.session import Talk


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="bp-export chat",
        description="Talk to an adapter, a model folder, a GGUF or a model in Ollama.",
        epilog="At the prompt /reset forgets what was said and /bye ends.",
    )
    parser.add_argument("target", help="a GGUF, an adapter or model folder; with --ollama a model's name there")
    parser.add_argument("--prompt", help="ask this once and end, instead of a conversation")
    parser.add_argument("--system", help="a system message to begin with")
    parser.add_argument("--max-tokens", type=int, default=512, help="tokens of an answer at most (default: 512)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 for always the likeliest token (default)")
    parser.add_argument("--seed", type=int, default=0, help="for other temperatures (default: 0)")
    parser.add_argument("--context", type=int, default=4096, help="tokens of the whole conversation (default: 4096)")
    parser.add_argument("--base", type=Path, help="the base model's folder (default: the one the adapter names)")
    parser.add_argument("--dequantize", action="store_true", help="unpack a base in 4 bits (bitsandbytes)")
    parser.add_argument("--quantization", help="run a folder in this type (default: its base's own)")
    parser.add_argument("--ollama", action="store_true", help="the target is a model in Ollama")
    parser.add_argument("--ollama-host", help="its address (default: http://127.0.0.1:11434)")
    add_json_flag(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    """Ask once, or converse."""
    from bp_export.chat.session import Manner, ask_once, converse  # NumPy only after --help

    if options.json and options.prompt is None:
        build_parser().error("--json needs --prompt")
    manner = Manner(options.system, options.max_tokens, options.temperature, options.seed)
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
def _open(options: argparse.Namespace) -> Iterator[Talk]:
    from bp_export.chat.session import OllamaTalk, open_talk

    if options.ollama:
        yield OllamaTalk(options.target, options.ollama_host)
        return
    with open_talk(
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
