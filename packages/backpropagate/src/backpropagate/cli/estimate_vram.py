"""`backprop estimate-vram`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from backpropagate import rails
from backpropagate.cli.flags import Json, flag_names
from backpropagate.cli.output import print_json
from backpropagate.memory_estimate import estimate_memory, read_config, require_estimator
from backpropagate.presets import MODEL_PRESETS
from backpropagate.settings import TOML_FILE, Resolved, all_settings, apply_lora_preset, resolve
from bp_runs.rail import Estimates, MemoryEstimate
from bp_runs.spec import LORA_PRESETS

CARDS = (8, 12, 16, 24, 32)
"""GiB of the GPUs in the table."""
_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)


def _named(key: str) -> Parameter:
    return Parameter(name=flag_names(all_settings()[key]))


_MODES = ("qlora", "lora", "full")


def estimate_vram(
    model: str | None = None,
    *,
    vram: float | None = None,
    mode: str | None = None,
    method: str | None = None,
    lora_preset: str | None = None,
    lora_r: int | None = None,
    target_modules: str | None = None,
    use_dora: bool | None = None,
    batch_size: Annotated[int | None, _named("training.batch_size")] = None,
    gradient_accumulation: Annotated[int | None, _named("training.gradient_accumulation")] = None,
    max_seq_length: int | None = None,
    table: bool = False,
    json: Json = False,
) -> int:
    """Estimate the GPU memory that a training run would need, from the model's shapes alone.

    Parameters
    ----------
    model: str
        Folder, Hub id or a name of `backprop models`; default: the setting.
    vram: float
        The GPU's memory in GiB; default: what is free on this machine's GPU, where there is one.
    mode: str
        qlora, lora, full, or auto by the GPU's memory.
    method: str
        sft, dpo, orpo, simpo or kto.
    lora_preset: str
        quality, balanced or fast.
    lora_r: int
        Rank of the adapter.
    target_modules: str
        Adapted layers, as for train.
    use_dora: bool
        DoRA.
    batch_size: int
        Rows in a micro-batch.
    gradient_accumulation: int
        Micro-batches in a step.
    max_seq_length: int
        Tokens of a row.
    table: bool
        The longest rows, one in a micro-batch, for GPUs of 8 to 32 GB; without a model for all of `backprop models`.
    """
    flags: dict[str, Any] = {
        "model": model, "mode": mode, "method": method, "lora_preset": lora_preset, "lora_r": lora_r,
        "target_modules": target_modules, "use_dora": use_dora, "batch_size": batch_size,
        "gradient_accumulation": gradient_accumulation, "max_seq_length": max_seq_length,
    }  # fmt: skip
    wanted = resolve(flags, os.environ, Path(TOML_FILE))
    if table:
        estimator = require_estimator()
        names = [wanted.settings.model.name] if model else list(MODEL_PRESETS)
        return _show_table([row for name in names for row in longest_rows(name, estimator)], as_json=json)
    memory = int(vram * 2**30) if vram else rails.free_memory()
    need = estimate_memory(wanted.settings, memory=memory)
    if json:
        print_json("estimate-vram", _to_json(wanted, need, memory))
    else:
        print("\n".join(_lines(wanted, need, memory)))  # noqa: T201
    return 0


def longest_rows(name: str, estimator: Estimates, *, kernels: str = "auto") -> list[dict[str, Any]]:
    """For each mode and LoRA preset the longest rows that each of `CARDS` holds, in tokens; None: not even 512."""
    found = []
    plain = resolve({"model": name, "batch_size": 1, "gradient_accumulation": 4, "kernels": kernels})
    config = read_config(plain.settings)
    for mode in _MODES:
        for preset in LORA_PRESETS if mode != "full" else ("",):
            wanted = apply_lora_preset(plain, preset) if preset else plain
            needs = {length: _need(wanted, mode, length, config, estimator) for length in _LENGTHS}
            fits = {str(card): max((n for n in needs if needs[n] <= card * 2**30), default=None) for card in CARDS}
            found.append({"model": name, "mode": mode, "preset": preset, "longest": fits})
    return found


def _need(wanted: Resolved, mode: Any, length: int, config: Mapping[str, Any], estimator: Estimates) -> int:
    settings = wanted.settings
    accumulation = 1 if mode == "full" else settings.training.gradient_accumulation
    training = replace(settings.training, mode=mode, gradient_accumulation=accumulation)
    changed = replace(settings, training=training, model=replace(settings.model, max_seq_length=length))
    return estimator.estimate(changed, config).needed


def _show_table(rows: Sequence[dict[str, Any]], *, as_json: bool) -> int:
    if as_json:
        print_json("estimate-vram-table", {"cards_gib": list(CARDS), "rows": list(rows)})
        return 0
    print("\n".join(table_lines(rows)))  # noqa: T201
    print("\nLongest rows in tokens at one row a micro-batch, estimated; a full fine-tune without accumulation.")  # noqa: T201
    return 0


def table_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table as lines of text."""
    cells = [("model", "mode", "preset", *(f"{card} GB" for card in CARDS))]
    cells += [
        (r["model"], r["mode"], r["preset"], *(f"{n:,}" if n else "-" for n in r["longest"].values())) for r in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells]


def _lines(wanted: Resolved, need: MemoryEstimate, memory: int | None) -> list[str]:
    settings = wanted.settings
    adapter = "" if need.mode == "full" else f", r={settings.lora.r} {settings.lora.target_modules}"
    training = settings.training
    rows = f"{training.batch_size} rows of {settings.model.max_seq_length:,} tokens"
    lines = [
        f"  {settings.model.name}: {need.parameters / 1e6:,.0f} M parameters, {need.trained / 1e6:,.1f} M trained",
        f"  {need.mode}, {training.method}{adapter}, {rows}",
    ]
    lines += [f"  {name:<12} {size / 2**30:>7.2f} GiB" for name, size in need.parts.items()]
    lines.append(f"  {'in use':<12} {need.in_use / 2**30:>7.2f} GiB")
    besides = "macOS, Metal and unused buffers" if need.unified else "the driver and unused buffers"
    lines.append(f"  {'other':<12} {need.beside / 2**30:>7.2f} GiB  {besides}")
    verdict = ""
    if memory:
        fits = "fits" if need.needed <= memory else "does not fit"
        verdict = f"  {fits} {memory / 2**30:.1f} GiB{' of unified memory' if need.unified else ''}"
    lines.append(f"  {'needed':<12} {need.needed / 2**30:>7.2f} GiB{verdict}")
    if need.paged:
        lines.append(f"  {'paged':<12} {need.paged / 2**30:>7.2f} GiB  the optimizer's; may lie in system RAM")
    if need.measured_runs:
        lines.append(f"  corrected by {need.measured_runs} measured runs on this card")
    return lines


def _to_json(wanted: Resolved, need: MemoryEstimate, memory: int | None) -> dict[str, Any]:
    return {
        "model": wanted.settings.model.name,
        "mode": need.mode,
        "parameters": need.parameters,
        "trained": need.trained,
        "parts_bytes": dict(need.parts),
        "in_use_bytes": need.in_use,
        "beside_bytes": need.beside,
        "needed_bytes": need.needed,
        "paged_bytes": need.paged,
        "memory_bytes": memory,
        "fits": None if memory is None else need.needed <= memory,
        "measured_runs": need.measured_runs,
    }
