"""`backprop chat`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bp_export
from backpropagate.adapter_lookup import find_adapter
from backpropagate.cli.flags import Json, output_folder, with_options
from backpropagate.cli.output import print_json
from backpropagate.exporting import find_base_folder, read_ollama_host
from bp_export.cli.options import CHAT, read_values
from bp_runs.errors import InvalidSettingError


def _chat(target: str | None = None, *, json: Json = False, **typed: Any) -> int:
    """Chat with an adapter, a merged model, a GGUF or a model in Ollama; /help shows the commands at the prompt.

    Parameters
    ----------
    target: str
        A GGUF, an adapter or model folder, a run's id, RUN@50 or RUN@best, or with --ollama a model's name there;
        default: lora in the output folder.
    """
    asked = read_values(CHAT, typed)
    prompt = asked["prompt"]
    if json and prompt is None:
        raise InvalidSettingError("--json needs one question", fix='Add: --prompt "What is the capital of France?"')
    if asked["ollama"] and target is None:
        raise InvalidSettingError("--ollama needs a model's name", fix="See which there are: backprop ollama list")
    runs = output_folder(None)
    wanted = target or str(runs / "lora")
    if target and not asked["ollama"]:
        wanted = str(find_adapter(target, runs))
    options = bp_export.chat.ChatOptions(*(asked[key] for key in ("system", "max_tokens", "temperature", "seed")))
    with open_target(wanted, asked) as session:
        if prompt is None:
            print(f"  model     {wanted}", file=sys.stderr)  # noqa: T201
            print(f"  template  {session.rendering.note}", file=sys.stderr)  # noqa: T201
            print("  help      /help shows the commands, /bye leaves", file=sys.stderr)  # noqa: T201
            bp_export.chat.converse(session, options, lambda: input("> " if sys.stdin.isatty() else ""), _write)
            return 0
        pieces = bp_export.chat.ask_once(session, prompt, options)
        if json:
            answer = "".join(pieces)
            rendering = asdict(session.rendering)
            print_json("chat", {"target": wanted, "prompt": prompt, "answer": answer, "rendering": rendering})
            return 0
        for piece in pieces:
            _write(piece)
    _write("\n")
    return 0


chat = with_options(_chat, CHAT)


def open_target(target: str, asked: Mapping[str, Any]) -> contextlib.AbstractContextManager[bp_export.chat.ChatSession]:
    """Something to talk to, by the options of `backprop chat`."""
    if asked["ollama"]:
        host = asked["ollama_host"] or read_ollama_host(os.environ)
        return contextlib.nullcontext(bp_export.chat.OllamaSession(target, host))
    return bp_export.chat.open_session(
        Path(target),
        base=find_base_folder(Path(target), asked["base"]),
        context=asked["context"],
        quantization=asked["quantization"],
        dequantize=asked["dequantize"],
    )


def _write(piece: str) -> None:
    print(piece, end="", flush=True)  # noqa: T201
