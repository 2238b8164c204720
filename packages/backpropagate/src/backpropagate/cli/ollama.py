"""`backprop ollama …`."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bp_export
from backpropagate.cli.flags import Json, with_options
from backpropagate.cli.output import print_json
from backpropagate.exporting import read_ollama_host
from bp_export.cli.options import REGISTER, read_values


def _register(path: Path, name: str, *, json: Json = False, **typed: Any) -> int:
    """Register a GGUF, or a folder of the format ollama-adapter, with the Ollama that runs here (OLLAMA_HOST).

    Parameters
    ----------
    path: Path
        The GGUF or the folder.
    name: str
        Its name in Ollama.
    """
    asked = read_values(REGISTER, typed)
    host = read_ollama_host(os.environ)
    asked["license"] = bp_export.ollama.read_license(asked["license"]) if asked["license"] else None
    made = bp_export.ollama.register_model(path, name, host=host, **asked)
    if json:
        print_json("ollama-register", asdict(made))
        return 0
    print(f"  ollama    {made.name} in Ollama {made.version}")  # noqa: T201
    print(f"  context   {made.describe_context()}")  # noqa: T201
    print(f"  template  {made.rendering.note}")  # noqa: T201
    for check in made.parity.checks if made.parity else ():
        print(f"  {check.name:<9} {check.result}: {check.note}")  # noqa: T201
    print(f"  it says   {' '.join((made.answer or '').split())}")  # noqa: T201
    print(f"  next      ollama run {made.name}")  # noqa: T201
    return 0


register = with_options(_register, REGISTER)


def list_(*, json: Json = False) -> int:
    """List the models of the Ollama that runs here (OLLAMA_HOST)."""
    models = bp_export.ollama.list_models(read_ollama_host(os.environ))
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
    bp_export.ollama.remove_model(name, read_ollama_host(os.environ))
    if json:
        print_json("ollama-rm", {"removed": name})
    else:
        print(f"  removed   {name}")  # noqa: T201
    return 0
