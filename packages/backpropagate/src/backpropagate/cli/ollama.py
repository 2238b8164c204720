"""`backprop ollama …`."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

import bp_export
from backpropagate.cli.flags import Json
from backpropagate.cli.output import print_json
from backpropagate.exporting import ollama_host


def register(
    path: Path,
    name: str,
    *,
    context: int | None = None,
    system: str | None = None,
    license: Path | None = None,
    force: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
) -> int:
    """Register a GGUF, or a folder of the format ollama-adapter, with the Ollama that runs here (OLLAMA_HOST).

    Parameters
    ----------
    path: Path
        The GGUF or the folder.
    name: str
        Its name in Ollama.
    context: int
        Tokens of context (num_ctx); default: Ollama's own.
    system: str
        A system prompt to keep with it; default: the one that a GGUF's chat template adds.
    license: Path
        A file with the licence, to keep with it; default: the name of the licence in a GGUF.
    force: bool
        Replace a model of that name.
    """
    host = ollama_host(os.environ)
    text = bp_export.read_license(license) if license else None
    register_it = bp_export.register_adapter if path.is_dir() else bp_export.register_gguf
    made = register_it(path, name, host=host, context=context, system=system, license=text, force=force)
    if json:
        print_json("ollama-register", asdict(made))
        return 0
    print(f"  ollama    {made.name} in Ollama {made.version}")  # noqa: T201
    print(f"  template  {made.rendering.note}")  # noqa: T201
    print(f"  it says   {' '.join((made.answer or '').split())}")  # noqa: T201
    print(f"  next      ollama run {made.name}")  # noqa: T201
    return 0


def list_(*, json: Json = False) -> int:
    """List the models of the Ollama that runs here (OLLAMA_HOST)."""
    models = bp_export.list_models(ollama_host(os.environ))
    if json:
        print_json("ollama-list", {"models": [asdict(model) for model in models]})
        return 0
    for model in models:
        print(f"  {model.name:<40} {model.bytes / 2**20:>10,.0f} MiB  {model.digest[:12]}")  # noqa: T201
    if not models:
        print("  Ollama has no models; give it one: backprop export ./output/lora --ollama-name my-model")  # noqa: T201
    return 0


def rm(name: str, *, json: Json = False) -> int:
    """Take a model away from the Ollama that runs here (OLLAMA_HOST).

    Parameters
    ----------
    name: str
        Its name in Ollama.
    """
    bp_export.remove_model(name, ollama_host(os.environ))
    if json:
        print_json("ollama-rm", {"removed": name})
    else:
        print(f"  removed   {name}")  # noqa: T201
    return 0
