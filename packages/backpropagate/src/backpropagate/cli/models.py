"""`backprop models`."""

from __future__ import annotations

import os
from typing import Any

from backpropagate import catalogue, certificate, rails, system
from backpropagate.cli.flags import Json
from backpropagate.cli.output import print_json
from backpropagate.presets import MODEL_PRESETS, ModelPreset
from bp_runs.rail import Estimates
from bp_runs.spec import Settings, TrainingSpec
from bp_runs.wording import render


def models(*, supported: bool = False, certify: str | None = None, json: Json = False) -> int:
    """Show the base models that are known to train well, with license and memory.

    Parameters
    ----------
    supported: bool
        Show every class of models instead: how its GGUF is written, and what was certified of it.
    certify: str
        Try the class of this model (a folder or Hub id) on a random copy of two layers: train, pack, merge, export.
    """
    if certify is not None:
        return _certify(certify, as_json=json)
    if supported:
        return _print_supported(as_json=json)
    estimator = rails.find_estimator()
    rows = [describe_preset(preset, estimator) for preset in MODEL_PRESETS.values()]
    if json:
        print_json("models", {"models": rows})
        return 0
    heads = ("name", "model", "licence", "B", "qlora", "lora", "full")
    cells = [heads, *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line, row in zip(cells, [None, *rows], strict=True):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())  # noqa: T201
        if row is not None:
            warning = f"; {row['restriction']}" if row["restriction"] else ""
            print(f"    {row['note']}{warning}")  # noqa: T201
    print("\nGiB that a card needs for 2 rows of 2,048 tokens at rank 16, estimated: backprop estimate-vram NAME")  # noqa: T201
    print("Train one: backprop train --data my_data.jsonl --model smollm3-3b")  # noqa: T201
    return 0


def _certify(name: str, *, as_json: bool) -> int:
    """Fetch config and tokenizer, try, keep the certificate; 0 if it passed, 1 if not."""
    home = system.program_home(os.environ)
    base = catalogue.find_model(name, offline=system.is_offline(os.environ), need=catalogue.TOKENIZER)
    from backpropagate.certify import certify  # it imports the trainer

    found = certify(base.folder)
    certificate.keep(found, home)
    if as_json:
        print_json("certificate", found.to_dict())
        return int(not found.passed)
    print(f"  {found.architecture} in {name}")  # noqa: T201
    for stage in found.stages:
        print(f"  {stage.name:<9} {stage.state:<10} {stage.note}")  # noqa: T201
        if stage.fix:
            print(f"  {'':<9} fix: {render(stage.fix)}")  # noqa: T201
    print(f"  {found.summary}" if found.passed else "  not certified")  # noqa: T201
    return int(not found.passed)


def _print_supported(*, as_json: bool) -> int:
    rows = certificate.list_support(system.program_home(os.environ))
    if as_json:
        print_json("models-supported", {"classes": [row.to_dict() for row in rows]})
        return 0
    heads = ("class", "GGUF", *certificate.STAGES[1:])
    cells = [heads, *(row.cells for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())  # noqa: T201
    print("\nA dot: not tried yet. Try a model's class in seconds: backprop models --certify ORG/NAME")  # noqa: T201
    return 0


def describe_preset(preset: ModelPreset, estimator: Estimates | None) -> dict[str, Any]:
    """A row of the table; memory in bytes by mode, empty where no rail can estimate it."""
    found: dict[str, Any] = {
        "name": preset.name,
        "model": preset.model,
        "licence": preset.licence,
        "restriction": preset.restriction,
        "note": preset.note,
        "parameters": None,
        "needed_bytes": {},
    }
    if estimator is None:
        return found
    mode: Any
    for mode in ("qlora", "lora", "full"):
        settings = Settings(training=TrainingSpec(mode=mode))
        need = estimator.estimate(settings, preset.config)
        found["parameters"] = need.parameters
        found["needed_bytes"][mode] = need.needed
    return found


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    needs = (f"{row['needed_bytes'][m] / 2**30:.1f}" if row["needed_bytes"] else "?" for m in ("qlora", "lora", "full"))
    size = f"{row['parameters'] / 1e9:.1f}" if row["parameters"] else "?"
    return (row["name"], row["model"], row["licence"], size, *needs)
