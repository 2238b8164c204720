"""``bp-export ADAPTER``."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bp_export.cli.output import add_json_flag, find_progress, tell, tell_json

if TYPE_CHECKING:
    from bp_export.export import ExportOutcome
    from bp_export.gguf.dry_run import ExportPlan

# Repeated here, since the table needs NumPy; a test compares the two.
QUANTIZATION_NAMES = (
    *("f32", "bf16", "f16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_0"),
    *("q4_k_m", "q4_k_s", "q4_0", "iq4_xs", "q3_k_m", "q2_k"),
)
_FORMATS = ("gguf", "merged", "lora", "gguf-adapter", "ollama-adapter", "mlx")


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="bp-export",
        description="Export a LoRA adapter, or a model, without torch.",
        epilog="Further commands, each with --help: bp-export ollama, bp-export chat, bp-export push, "
        "bp-export imatrix. A folder of such a name is ./chat.",
    )
    parser.add_argument("adapter", type=Path, help="a PEFT adapter folder, or a Hugging Face model folder")
    parser.add_argument("--format", choices=_FORMATS, default="gguf", help="default: gguf")
    parser.add_argument("--quantization", help=f"for gguf: {', '.join(QUANTIZATION_NAMES)} (default: q4_k_m)")
    parser.add_argument("--output", type=Path, help="file or folder to write (default: beside the adapter)")
    parser.add_argument("--force", action="store_true", help="replace an earlier export, and a model in Ollama")
    parser.add_argument("--base", type=Path, help="the base model's folder (default: the one the adapter names)")
    parser.add_argument("--dequantize", action="store_true", help="unpack a base in 4 bits (bitsandbytes)")
    parser.add_argument("--pre", help="llama.cpp's name of the tokenizer's splitting rule, if it is not recognised")
    parser.add_argument("--imatrix", type=Path, help="an importance matrix (GGUF or .dat); see bp-export imatrix")
    parser.add_argument("--name", help="the name to write into the GGUF")
    parser.add_argument("--split-mib", type=int, help="most MiB of tensors a file; a larger GGUF becomes several")
    parser.add_argument("--ollama-base", help="for ollama-adapter: the base in Ollama, or a GGUF of it")
    parser.add_argument("--dry-run", action="store_true", help="say what a GGUF would hold, and write nothing")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="compare the GGUF with the model in llama.cpp (default: where the extra `verify` is installed)",
    )
    parser.add_argument("--ollama", action="store_true", help="register the GGUF with a running Ollama")
    parser.add_argument("--ollama-name", help="its name there, which registers it too (default: the file's name)")
    parser.add_argument("--ollama-host", help="its address (default: http://127.0.0.1:11434)")
    parser.add_argument("--ollama-context", type=int, help="tokens of context there, num_ctx (default: Ollama's own)")
    add_json_flag(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    """Plan, or export and perhaps register."""
    wants_ollama = options.ollama or options.ollama_name is not None
    if wants_ollama and options.format != "gguf":
        build_parser().error("--ollama needs --format gguf")
    if wants_ollama and options.split_mib is not None:
        build_parser().error("--ollama takes one file, and --split-mib makes several")
    if options.dry_run and options.format != "gguf":
        build_parser().error("--dry-run needs --format gguf")
    if options.dry_run:
        _tell_plan(_plan(options), as_json=options.json)
        return 0
    outcome, registered = _export(options, wants_ollama=wants_ollama)
    _tell_outcome(outcome, registered, as_json=options.json)
    return 0


def _export(options: argparse.Namespace, *, wants_ollama: bool) -> tuple[ExportOutcome, str | None]:
    from bp_export.export import export_adapter, name_gguf  # NumPy only after --help
    from bp_export.ollama.register import register_gguf
    from bp_export.ollama.server import require_ollama

    name = options.ollama_name
    if wants_ollama:
        path = options.output or name_gguf(options.adapter, options.quantization, name=options.name)
        name = name or path.stem
        require_ollama(options.ollama_host, name=name, force=options.force)
    outcome = export_adapter(
        options.adapter,
        output=options.output,
        format=options.format,
        quantization=options.quantization,
        base=options.base,
        pre=options.pre,
        name=options.name,
        importance=options.imatrix,
        split_bytes=None if options.split_mib is None else options.split_mib * 2**20,
        ollama_base=options.ollama_base,
        dequantize=options.dequantize,
        force=options.force,
        verify=options.verify,
        progress=find_progress(as_json=options.json),
    )
    if not wants_ollama:
        return outcome, None
    model = register_gguf(
        outcome.path, name, host=options.ollama_host, context=options.ollama_context, force=options.force
    )
    return outcome, model.name


def _plan(options: argparse.Namespace) -> ExportPlan:
    from bp_export.export import plan_export  # NumPy only after --help

    plan: ExportPlan = plan_export(
        options.adapter,
        output=options.output,
        quantization=options.quantization,
        base=options.base,
        pre=options.pre,
        name=options.name,
        importance=options.imatrix,
        dequantize=options.dequantize,
    )
    return plan


def _tell_plan(plan: ExportPlan, *, as_json: bool) -> None:
    if as_json:
        tell_json({**dataclasses.asdict(plan), "path": str(plan.path)})
        return
    for tensor in plan.tensors:
        mark = "+" if tensor.is_changed else " "
        tell(f"{mark} {tensor.name:<32} {tensor.type:<6} {'x'.join(map(str, tensor.shape)):>16}")
    size, free = plan.bytes / 2**20, plan.free_bytes / 2**20
    tell(f"{plan.path}\n  {len(plan.tensors)} tensors, {size:,.1f} MiB ({free:,.0f} free), {plan.seconds:.0f} s")


def _tell_outcome(outcome: ExportOutcome, registered: str | None, *, as_json: bool) -> None:
    if as_json:
        fields: dict[str, Any] = dataclasses.asdict(outcome)
        tell_json({**fields, "path": str(outcome.path), "ollama": registered})
        return
    kind = f"{outcome.format} {outcome.quantization or ''}".strip()
    size = f"{outcome.bytes / 2**20:,.1f} MiB, {outcome.tensors} tensors, {outcome.seconds:.1f} s"
    size += f", {outcome.kernels} kernels" if outcome.kernels else ""
    tell(f"{outcome.path}\n  {kind}, {size}\n  sha256 {outcome.sha256}")
    if outcome.parity is None:
        tell(f"  {'training':<11} {outcome.rendering.result:<10} {outcome.rendering.note}")
    for check in outcome.parity.checks if outcome.parity else ():
        tell(f"  {check.name:<11} {check.result:<10} {check.note}")
    if outcome.parity:
        tell(f"  verified: {outcome.parity.summary}")
    if registered:
        tell(f"  in Ollama as {registered}: ollama run {registered}")
