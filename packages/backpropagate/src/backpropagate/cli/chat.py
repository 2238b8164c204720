"""`backprop chat`."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

import bp_export
from backpropagate.adapter_lookup import find_adapter
from backpropagate.cli.flags import Json, output_folder
from backpropagate.cli.output import print_json
from backpropagate.exporting import find_base_folder, ollama_host
from bp_runs.errors import InvalidSettingError


def chat(
    target: str | None = None,
    *,
    prompt: Annotated[str | None, Parameter(name=("--prompt", "-p"))] = None,
    system: str | None = None,
    max_tokens: int = 512,
    temperature: float = 0.0,
    seed: int = 0,
    context: int = 4096,
    base: str | None = None,
    quantization: Annotated[str | None, Parameter(name=("--quantization", "-q"))] = None,
    dequantize: Annotated[bool, Parameter(negative="")] = False,
    ollama: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
) -> int:
    """Talk to an adapter, a merged model, a GGUF or a model in Ollama; /reset forgets what was said, /bye ends.

    Parameters
    ----------
    target: str
        A GGUF, an adapter or model folder, a run's id, RUN@50 or RUN@best, or with --ollama a model's name there;
        default: lora in the output folder.
    prompt: str
        Ask this once and end, instead of a conversation.
    system: str
        A system message to begin with.
    max_tokens: int
        Tokens of an answer at most.
    temperature: float
        0 for always the likeliest token.
    seed: int
        For other temperatures.
    context: int
        Tokens of the whole conversation.
    base: str
        Folder or Hub id of the base model, where it is not the one that the adapter names.
    quantization: str
        Run a folder in this type; default: its base's own.
    dequantize: bool
        Unpack a base in 4 bits (bitsandbytes).
    ollama: bool
        The target is a model in Ollama.
    """
    if json and prompt is None:
        raise InvalidSettingError("--json needs one question", fix='Add: --prompt "What is the capital of France?"')
    if ollama and target is None:
        raise InvalidSettingError("--ollama needs a model's name", fix="See which there are: backprop ollama list")
    runs = output_folder(None)
    wanted = target or str(runs / "lora")
    if target and not ollama:
        wanted = str(find_adapter(target, runs))
    manner = bp_export.Manner(system, max_tokens, temperature, seed)
    if ollama:
        opened: contextlib.AbstractContextManager[bp_export.Talk] = contextlib.nullcontext(
            bp_export.OllamaTalk(wanted, ollama_host(os.environ))
        )
    else:
        opened = bp_export.open_talk(
            Path(wanted),
            base=find_base_folder(Path(wanted), base),
            context=context,
            quantization=quantization,
            dequantize=dequantize,
        )
    with opened as talk:
        if prompt is None:
            print(f"  template  {talk.rendering.note}", file=sys.stderr)  # noqa: T201
            bp_export.converse(talk, manner, lambda: input("> " if sys.stdin.isatty() else ""), _write)
            return 0
        pieces = bp_export.ask_once(talk, prompt, manner)
        if json:
            answer = "".join(pieces)
            rendering = asdict(talk.rendering)
            print_json("chat", {"target": wanted, "prompt": prompt, "answer": answer, "rendering": rendering})
            return 0
        for piece in pieces:
            _write(piece)
    _write("\n")
    return 0


def _write(piece: str) -> None:
    print(piece, end="", flush=True)  # noqa: T201
