"""`backprop export`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import bp_export
from backpropagate.adapter_lookup import find_adapter
from backpropagate.cli.flags import Json, output_folder, with_options
from backpropagate.cli.output import ByteLines, print_json
from backpropagate.exporting import ExportResult, export_adapter, plan_export
from bp_export.cli.options import EXPORT, read_values
from bp_runs.wording import render


def _export(adapter: str | None = None, *, json: Json = False, **typed: Any) -> int:
    """Export an adapter: base and adapter become one file that llama.cpp and Ollama run.

    Parameters
    ----------
    adapter: str
        Adapter folder, a run's id, or one of its checkpoints: RUN@50, RUN@best; default: lora in the output folder.
    """
    runs = output_folder(None)
    folder = runs / "lora" if adapter is None else find_adapter(adapter, runs)
    values = read_values(EXPORT, typed)
    if values.pop("dry_run"):
        return _print_plan(plan_export(folder, **values), as_json=json)
    if sys.stdout.isatty() and not json:
        with _ByteProgress() as bar:
            result = export_adapter(folder, **values, progress=bar)
    else:
        lines = ByteLines(end="comparing the file with the trained model")
        result = export_adapter(folder, **values, progress=lines)
    if json:
        print_json("export", result.to_dict())
    else:
        _print_result(result, folder)
    return 0


export = with_options(_export, EXPORT)


def _print_plan(plan: bp_export.ExportPlan, *, as_json: bool) -> int:
    if as_json:
        print_json("export-plan", {**asdict(plan), "path": str(plan.path)})
        return 0
    for tensor in plan.tensors:
        mark = "+" if tensor.is_changed else " "
        print(f"  {mark} {tensor.name:<32} {tensor.type:<6} {'x'.join(map(str, tensor.shape)):>16}")  # noqa: T201
    print(f"  plan      {plan.path}: {len(plan.tensors)} tensors, {plan.bytes / 2**20:,.1f} MiB")  # noqa: T201
    print(f"  room      {plan.free_bytes / 2**20:,.0f} MiB are free; about {plan.seconds:.0f} s")  # noqa: T201
    _print_notes(plan.notes)
    return 0


def _print_notes(notes: tuple[str, ...]) -> None:
    for note in notes:
        print(f"  note      {render(note)}")  # noqa: T201


def name_via(via: str) -> str:
    """``native``, or ``via llama.cpp b11434``."""
    return via if via == "native" else f"via {via}"


def _print_result(result: ExportResult, folder: Path) -> None:
    done = result.outcome
    kind = f"{done.format} {done.quantization}, {name_via(done.via)}" if done.via else done.format
    print(f"  exported  {done.path}  ({kind}, {done.bytes / 2**20:,.1f} MiB, {done.seconds:.1f} s)")  # noqa: T201
    _print_notes(done.notes)
    if done.parity is None:
        print(f"  {'training':<11} {done.rendering.result:<10} {done.rendering.note}")  # noqa: T201
    for check in done.parity.checks if done.parity else ():
        print(f"  {check.name:<11} {check.result:<10} {check.note}")  # noqa: T201
    if done.parity:
        print(f"  verified  {done.parity.summary}")  # noqa: T201
    if result.ollama:
        context = result.ollama.describe_context()
        print(f"  ollama    registered as {result.ollama.name}, context: {context}")  # noqa: T201
        for check in result.ollama.parity.checks if result.ollama.parity else ():
            print(f"            {check.name:<11} {check.result:<10} {check.note}")  # noqa: T201
        print(f"  next      ollama run {result.ollama.name}")  # noqa: T201
    elif done.format == "gguf":
        print(f"  next      backprop export {folder} --ollama-name my-model    with Ollama running")  # noqa: T201


class _ByteProgress:
    """A progress bar over bytes written."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("  export  "), BarColumn(bar_width=24), DownloadColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, transient=True)
        self._task = self._progress.add_task("export", total=None)

    def __call__(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
