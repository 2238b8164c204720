"""``bp-export ollama``."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from bp_export.cli.options import REGISTER
from bp_export.cli.output import add_json_flag, add_options, tell, tell_json

if TYPE_CHECKING:
    from bp_export.ollama.register import OllamaModel


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="bp-export ollama", description="Models of a running Ollama.")
    parser.add_argument("--host", help="its address (default: http://127.0.0.1:11434)")
    add_json_flag(parser)
    actions = parser.add_subparsers(dest="action", required=True)
    register = actions.add_parser("register", help="register a GGUF, or a folder of the format ollama-adapter")
    register.add_argument("path", type=Path, help="the GGUF or the folder")
    register.add_argument("name", help="its name in Ollama")
    add_options(register, REGISTER, has_json=False)
    actions.add_parser("list", help="list the models that it has")
    actions.add_parser("rm", help="take a model away").add_argument("name", help="its name in Ollama")
    return parser


def run(options: argparse.Namespace) -> int:
    """Register, list or remove."""
    from bp_export import ollama  # NumPy only after --help

    if options.action == "register":
        made = _register(options)
        if options.json:
            tell_json([dataclasses.asdict(made)])
        else:
            tell(f"{made.name}\n  in Ollama {made.version}; it says: {made.answer!r}\n  ollama run {made.name}")
            tell(f"  context: {made.describe_context()}\n  chat template: {made.rendering.note}")
            for check in made.parity.checks if made.parity else ():
                tell(f"  {check.name:<11} {check.result:<10} {check.note}")
    elif options.action == "rm":
        ollama.remove_model(options.name, options.host)
        tell_json([{"name": options.name, "removed": True}]) if options.json else tell(f"{options.name} removed")
    else:
        models = ollama.list_models(options.host)
        if options.json:
            tell_json([dataclasses.asdict(model) for model in models])
        for model in () if options.json else models:
            tell(f"{model.name:<40} {model.bytes / 2**20:>10,.0f} MiB  {model.digest[:12]}")
    return 0


def _register(options: argparse.Namespace) -> OllamaModel:
    from bp_export import ollama

    license = ollama.read_license(options.license) if options.license else None
    return ollama.register_model(
        options.path,
        options.name,
        host=options.host,
        system=options.system,
        context=options.context,
        license=license,
        trained=options.trained,
        force=options.force,
    )
