"""``bp-export``: the command line of this package alone; ``backprop export`` is the larger one."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bp_runs.errors import CodedError

if TYPE_CHECKING:
    from bp_export.dryrun import ExportPlan
    from bp_export.export import ExportOutcome

_INTERRUPTED = 130
# Repeated here, since the table needs NumPy; a test compares the two.
QUANTIZATION_NAMES = (
    *("f32", "bf16", "f16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_0"),
    *("q4_k_m", "q4_k_s", "q4_0", "iq4_xs", "q3_k_m", "q2_k"),
)


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="bp-export",
        description="Export a LoRA adapter, or a model, without torch.",
        epilog="See also: bp-export ollama --help",
    )
    parser.add_argument("adapter", type=Path, help="a PEFT adapter folder, or a Hugging Face model folder")
    formats = ("gguf", "merged", "lora", "gguf-adapter", "ollama-adapter", "mlx")
    parser.add_argument("--format", choices=formats, default="gguf", help="default: gguf")
    parser.add_argument(
        "--quantization", default="q4_k_m", help=f"for gguf: {', '.join(QUANTIZATION_NAMES)} (default: q4_k_m)"
    )
    parser.add_argument("--output", type=Path, help="file or folder to write (default: beside the adapter)")
    parser.add_argument("--base", type=Path, help="the base model's folder (default: the one the adapter names)")
    parser.add_argument("--pre", help="llama.cpp's name of the tokenizer's splitting rule, if it is not recognised")
    parser.add_argument("--imatrix", type=Path, help="an importance matrix of llama-imatrix (GGUF or .dat)")
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
    parser.add_argument("--ollama-name", help="its name there (default: the file's name)")
    parser.add_argument("--ollama-host", help="its address (default: http://127.0.0.1:11434)")
    parser.add_argument("--json", action="store_true", help="print the outcome, or the error, as one JSON object")
    return parser


def build_ollama_parser() -> argparse.ArgumentParser:
    """The arguments of ``bp-export ollama``."""
    parser = argparse.ArgumentParser(prog="bp-export ollama", description="Models of a running Ollama.")
    parser.add_argument("--host", help="its address (default: http://127.0.0.1:11434)")
    parser.add_argument("--json", action="store_true", help="print what happened, or the error, as JSON")
    actions = parser.add_subparsers(dest="action", required=True)
    register = actions.add_parser("register", help="register a GGUF")
    register.add_argument("path", type=Path, help="the GGUF")
    register.add_argument("name", help="its name in Ollama")
    register.add_argument("--context", type=int, help="tokens of context (num_ctx)")
    register.add_argument("--system", help="a system prompt to keep with it")
    actions.add_parser("list", help="list the models that it has")
    actions.add_parser("rm", help="take a model away").add_argument("name", help="its name in Ollama")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 1 the user's input, 2 the rest, 3 not verified, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["ollama"]:
        return _run_ollama(build_ollama_parser().parse_args(words[1:]))
    parser = build_parser()
    options = parser.parse_args(words)
    if options.ollama and options.format != "gguf":
        parser.error("--ollama needs --format gguf")
    if options.dry_run and options.format != "gguf":
        parser.error("--dry-run needs --format gguf")
    try:
        if options.dry_run:
            _print_plan(_plan(options), as_json=options.json)
            return 0
        outcome, registered = _export(options)
    except CodedError as error:
        _print_error(error, as_json=options.json)
        return error.exit_status
    except KeyboardInterrupt:
        print("Interrupted; nothing was left behind.", file=sys.stderr)  # noqa: T201
        return _INTERRUPTED
    _print_outcome(outcome, registered, as_json=options.json)
    return 0


def _run_ollama(options: argparse.Namespace) -> int:
    from bp_export import ollama  # NumPy only after --help

    try:
        if options.action == "register":
            made = ollama.register_gguf(
                options.path, options.name, host=options.host, context=options.context, system=options.system
            )
            found: list[dict[str, Any]] = [dataclasses.asdict(made)]
        elif options.action == "rm":
            ollama.remove_model(options.name, options.host)
            found = [{"name": options.name, "removed": True}]
        else:
            found = [dataclasses.asdict(model) for model in ollama.list_models(options.host)]
    except CodedError as error:
        _print_error(error, as_json=options.json)
        return error.exit_status
    print(json.dumps(found) if options.json else "\n".join(str(row["name"]) for row in found))  # noqa: T201
    return 0


def _export(options: argparse.Namespace) -> tuple[ExportOutcome, str | None]:
    from bp_export.export import export_adapter  # NumPy only after --help
    from bp_export.ollama import register_gguf, require_ollama

    if options.ollama:
        require_ollama(options.ollama_host, name=options.ollama_name)
    outcome = export_adapter(
        options.adapter,
        output=options.output,
        format=options.format,
        quantization=options.quantization,
        base=options.base,
        pre=options.pre,
        name=options.name,
        importance=options.imatrix,
        split_bytes=options.split_mib * 2**20 if options.split_mib else None,
        ollama_base=options.ollama_base,
        verify=options.verify,
        progress=None if options.json or not sys.stderr.isatty() else _print_progress,
    )
    if not options.ollama:
        return outcome, None
    name = options.ollama_name or outcome.path.stem.lower()
    return outcome, register_gguf(outcome.path, name, host=options.ollama_host).name


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
    )
    return plan


def _print_plan(plan: ExportPlan, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({**dataclasses.asdict(plan), "path": str(plan.path)}))  # noqa: T201
        return
    for tensor in plan.tensors:
        mark = "+" if tensor.is_changed else " "
        print(f"{mark} {tensor.name:<32} {tensor.type:<6} {'x'.join(map(str, tensor.shape)):>16}")  # noqa: T201
    size, free = plan.bytes / 2**20, plan.free_bytes / 2**20
    print(f"{plan.path}\n  {len(plan.tensors)} tensors, {size:,.1f} MiB ({free:,.0f} free), {plan.seconds:.0f} s")  # noqa: T201


def _print_progress(done: int, total: int) -> None:
    end = "\n" if done == total else ""
    print(f"\r{done / total:4.0%} of {total / 2**20:,.0f} MiB", end=end, file=sys.stderr, flush=True)  # noqa: T201


def _print_outcome(outcome: ExportOutcome, registered: str | None, *, as_json: bool) -> None:
    if as_json:
        fields: dict[str, Any] = dataclasses.asdict(outcome)
        print(json.dumps({**fields, "path": str(outcome.path), "ollama": registered}))  # noqa: T201
        return
    kind = f"{outcome.format} {outcome.quantization or ''}".strip()
    size = f"{outcome.bytes / 2**20:,.1f} MiB, {outcome.tensors} tensors, {outcome.seconds:.1f} s"
    print(f"{outcome.path}\n  {kind}, {size}\n  sha256 {outcome.sha256}")  # noqa: T201
    for check in outcome.parity.checks if outcome.parity else ():
        print(f"  {check.name:<11} {check.result:<8} {check.note}")  # noqa: T201
    if registered:
        print(f"  in Ollama as {registered}: ollama run {registered}")  # noqa: T201


def _print_error(error: CodedError, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(error.to_dict(), default=str))  # noqa: T201
        return
    print(str(error), file=sys.stderr)  # noqa: T201
    if error.cause:
        print(f"  because: {error.cause}", file=sys.stderr)  # noqa: T201
    print(f"  {error.way_out}", file=sys.stderr)  # noqa: T201
