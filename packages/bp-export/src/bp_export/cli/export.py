"""``bp-export ADAPTER``."""

from __future__ import annotations

import argparse
import dataclasses
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bp_export
from bp_export.cli.options import EXPORT, read_values
from bp_export.cli.output import add_options, find_progress, tell, tell_json
from bp_runs.wording import render

if TYPE_CHECKING:
    from bp_export.formats.request import ExportOutcome, ExportPlan
    from bp_export.ollama import OllamaModel


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="bp-export",
        description="Export a LoRA adapter, or a model, without torch.",
        epilog="Further commands, each with --help: bp-export ollama, bp-export chat, bp-export push, "
        "bp-export imatrix. A folder of such a name is ./chat.",
    )
    parser.add_argument("adapter", type=Path, help="a PEFT adapter folder, or a Hugging Face model folder")
    parser.add_argument("--version", action="version", version=f"bp-export {version('bp-export')}")
    add_options(parser, EXPORT)
    return parser


_OLLAMA = ("ollama", "ollama_name", "ollama_host", "ollama_context")


def run(options: argparse.Namespace) -> int:
    """Plan, or export and perhaps register."""
    values = read_values(EXPORT, vars(options))
    ollama = {name: values.pop(name) for name in _OLLAMA}
    is_plan, wants_ollama = values.pop("dry_run"), ollama["ollama"] or ollama["ollama_name"] is not None
    if wants_ollama and options.format != "gguf":
        build_parser().error("--ollama needs --format gguf")
    if wants_ollama and options.split_bytes is not None:
        build_parser().error("--ollama takes one file, and --split-mib makes several")
    from bp_export.export import build_request  # NumPy only after --help

    request = build_request(options.adapter, **values)
    if is_plan:
        _tell_plan(request.plan(), as_json=options.json)
        return 0
    progress = find_progress(as_json=options.json)
    if not wants_ollama:
        _tell_outcome(request.write(progress), None, as_json=options.json)
        return 0
    name = _require_ollama(options)
    outcome = request.write(progress)
    model = bp_export.ollama.register_gguf(
        outcome.path,
        name,
        host=ollama["ollama_host"],
        context=ollama["ollama_context"],
        trained=options.adapter,
        allowed=outcome.parity.witness_bound if outcome.parity else None,
        force=options.force,
    )
    _tell_outcome(outcome, model, as_json=options.json)
    return 0


def _require_ollama(options: argparse.Namespace) -> str:
    """The name that Ollama is going to know the file by; rejected before the work, where it is taken."""
    from bp_export.formats.gguf import name_gguf  # NumPy only after --help

    path = options.output or name_gguf(options.adapter, options.quantization, name=options.name)
    name = str(options.ollama_name or path.stem)
    bp_export.ollama.require_ollama(options.ollama_host, name=name, force=options.force)
    return name


def _tell_plan(plan: ExportPlan, *, as_json: bool) -> None:
    if as_json:
        tell_json({**dataclasses.asdict(plan), "path": str(plan.path)})
        return
    for tensor in plan.tensors:
        mark = "+" if tensor.is_changed else " "
        tell(f"{mark} {tensor.name:<32} {tensor.type:<6} {'x'.join(map(str, tensor.shape)):>16}")
    size, free = plan.bytes / 2**20, plan.free_bytes / 2**20
    tell(f"{plan.path}\n  {len(plan.tensors)} tensors, {size:,.1f} MiB ({free:,.0f} free), {plan.seconds:.0f} s")


def _tell_outcome(outcome: ExportOutcome, registered: OllamaModel | None, *, as_json: bool) -> None:
    if as_json:
        fields: dict[str, Any] = {**dataclasses.asdict(outcome), "mmproj": outcome.mmproj and str(outcome.mmproj)}
        ollama: dict[str, Any] = {
            "ollama": registered and registered.name,
            "ollama_context": registered and registered.context,
        }
        ollama["ollama_parity"] = registered.parity.to_dict() if registered and registered.parity else None
        tell_json({**fields, "path": str(outcome.path), **ollama})
        return
    kind = f"{outcome.format} {outcome.quantization or ''}".strip()
    if outcome.via is not None:
        kind += ", native" if outcome.via == "native" else f", via {outcome.via}"
    size = f"{outcome.bytes / 2**20:,.1f} MiB, {outcome.tensors} tensors, {outcome.seconds:.1f} s"
    size += f", {outcome.kernels} kernels" if outcome.kernels else ""
    tell(f"{outcome.path}\n  {kind}, {size}\n  sha256 {outcome.sha256}")
    for note in outcome.notes:
        tell(f"  note: {render(note)}")
    if outcome.parity is None:
        tell(f"  {'training':<11} {outcome.rendering.result:<10} {outcome.rendering.note}")
    for check in outcome.parity.checks if outcome.parity else ():
        tell(f"  {check.name:<11} {check.result:<10} {check.note}")
    if outcome.parity:
        tell(f"  verified: {outcome.parity.summary}")
    if registered:
        name, context = registered.name, registered.describe_context()
        for check in registered.parity.checks if registered.parity else ():
            tell(f"  in Ollama: {check.name:<11} {check.result:<10} {check.note}")
        tell(f"  in Ollama as {name}: ollama run {name}\n  context: {context}")
