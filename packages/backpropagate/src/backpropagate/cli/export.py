"""`backprop export`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal, Self, TypeAlias

from cyclopts import Parameter

import bp_export
from backpropagate.adapter_lookup import find_adapter
from backpropagate.cli.flags import Json, output_folder
from backpropagate.cli.output import print_json
from backpropagate.exporting import ExportResult, export_adapter, plan_export
from backpropagate.keywords import QuantizationName

Format: TypeAlias = Literal["gguf", "merged", "lora", "gguf-adapter", "ollama-adapter", "mlx"]


def export(
    adapter: str | None = None,
    *,
    format: Annotated[Format, Parameter(name=("--format", "-f"))] = "gguf",
    quantization: Annotated[QuantizationName | None, Parameter(name=("--quantization", "-q"))] = None,
    output: Annotated[Path | None, Parameter(name=("--output", "-o"))] = None,
    base: str | None = None,
    pre: str | None = None,
    imatrix: Path | None = None,
    split_mib: int | None = None,
    ollama_base: str | None = None,
    verify: bool | None = None,
    ollama: Annotated[bool, Parameter(negative="")] = False,
    ollama_name: str | None = None,
    dequantize: Annotated[bool, Parameter(negative="")] = False,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    force: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
) -> int:
    """Export an adapter: base and adapter become one file that llama.cpp and Ollama run.

    Parameters
    ----------
    adapter: str
        Adapter folder, a run's id, or one of its checkpoints: RUN@50, RUN@best; default: lora in the output folder.
    format: str
        gguf: one quantized file; merged: a Hugging Face folder; lora: a copy of the adapter; gguf-adapter,
        ollama-adapter, mlx: the adapter alone, for llama.cpp, Ollama before 0.34.1, and mlx-lm.
    quantization: str
        The GGUF's type; default: q4_k_m.
    output: Path
        File (gguf) or folder to write; default: beside the adapter.
    base: str
        Folder or Hub id of the base model, where it is not the one that the adapter names.
    pre: str
        Name of llama.cpp's pre-tokenizer, where it is not recognised.
    imatrix: Path
        An importance matrix of llama-imatrix, for the quantizers.
    split_mib: int
        Most MiB of tensors a file; a larger GGUF becomes several.
    ollama_base: str
        For ollama-adapter: the base's name in Ollama, or a GGUF of it.
    verify: bool
        Compare the GGUF with the model in llama.cpp; default: where llama.cpp is installed.
    ollama: bool
        Register the GGUF with the Ollama that runs here.
    ollama_name: str
        Name in Ollama; given alone it registers too. Default: the file's name.
    dequantize: bool
        Unpack a base in 4 bits (bitsandbytes), instead of asking for the original.
    dry_run: bool
        Say what a GGUF would hold, its size and about how long it takes, and write nothing.
    force: bool
        Replace an earlier export, and a model of that name in Ollama.
    """
    runs = output_folder(None)
    folder = runs / "lora" if adapter is None else find_adapter(adapter, runs)
    if dry_run:
        plan = plan_export(
            folder,
            format,
            quantization=quantization,
            output=output,
            base=base,
            pre=pre,
            importance=imatrix,
            dequantize=dequantize,
        )
        return _tell_plan(plan, as_json=json)
    with _Bytes(is_shown=sys.stdout.isatty() and not json) as bar:
        result = export_adapter(
            folder,
            format,
            quantization=quantization,
            output=output,
            base=base,
            pre=pre,
            importance=imatrix,
            split_bytes=None if split_mib is None else split_mib * 2**20,
            ollama_base=ollama_base,
            verify=verify,
            ollama=ollama,
            ollama_name=ollama_name,
            dequantize=dequantize,
            force=force,
            progress=bar,
        )
    if json:
        print_json("export", result.to_dict())
    else:
        _tell_end(result, folder)
    return 0


def _tell_plan(plan: bp_export.ExportPlan, *, as_json: bool) -> int:
    if as_json:
        print_json("export-plan", {**asdict(plan), "path": str(plan.path)})
        return 0
    for tensor in plan.tensors:
        mark = "+" if tensor.is_changed else " "
        print(f"  {mark} {tensor.name:<32} {tensor.type:<6} {'x'.join(map(str, tensor.shape)):>16}")  # noqa: T201
    print(f"  plan      {plan.path}: {len(plan.tensors)} tensors, {plan.bytes / 2**20:,.1f} MiB")  # noqa: T201
    print(f"  room      {plan.free_bytes / 2**20:,.0f} MiB are free; about {plan.seconds:.0f} s")  # noqa: T201
    return 0


def _tell_end(result: ExportResult, folder: Path) -> None:
    done = result.outcome
    kind = f"{done.format} {done.quantization}" if done.format == "gguf" else done.format
    print(f"  exported  {done.path}  ({kind}, {done.bytes / 2**20:,.1f} MiB, {done.seconds:.1f} s)")  # noqa: T201
    if done.parity is None:
        print(f"  {'training':<11} {done.rendering.result:<10} {done.rendering.note}")  # noqa: T201
    for check in done.parity.checks if done.parity else ():
        print(f"  {check.name:<11} {check.result:<10} {check.note}")  # noqa: T201
    if done.parity:
        print(f"  verified  {done.parity.summary}")  # noqa: T201
    if result.ollama:
        print(f"  ollama    registered as {result.ollama}")  # noqa: T201
        print(f"  next      ollama run {result.ollama}")  # noqa: T201
    elif done.format == "gguf":
        print(f"  next      backprop export {folder} --ollama-name my-model    with Ollama running")  # noqa: T201


class _Bytes:
    """A progress bar over bytes written."""

    def __init__(self, *, is_shown: bool) -> None:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("  export  "), BarColumn(bar_width=24), DownloadColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, transient=True, disable=not is_shown)
        self._task = self._progress.add_task("export", total=None)

    def __call__(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
