"""Training on from an adapter: which weights a run starts from, and a finished run that gets more steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from backpropagate.adapter_lookup import Selection, find_adapter, materialize
from backpropagate.errors import AdapterSelectionError
from backpropagate.settings import Resolved, Source, from_record
from bp_runs.adapter import is_other_base, read_adapter_folder, read_manifest
from bp_runs.errors import AdapterInvalidError, InvalidSettingError
from bp_runs.events import Notice
from bp_runs.rail import Rail
from bp_runs.record import RunRecord
from bp_runs.store import RunStore

_COURSE: Mapping[str, str] = MappingProxyType(
    {"linear": "falls linearly to 0", "cosine": "falls to 0 along a cosine", "constant": "stays there"}
)


def settle_start(resolved: Resolved, output: Path, rail: Rail | None = None) -> Resolved:
    """The settings with the adapter that ``start_from`` selects as a folder, and with its rank, scale and layers.

    What a flag sets stays; if the adapter has something else, the rail says so with both values.

    Raises:
        InvalidSettingError: Full fine-tuning, or an adapter that starts from pissa or loftq.
        CodedError: As `backpropagate.adapter_lookup.find_adapter`.
    """
    wanted = resolved.settings
    if wanted.training.start_from is None:
        return resolved
    if wanted.training.mode == "full" or wanted.lora.init_lora_weights != "default":
        mode, start = wanted.training.mode, wanted.lora.init_lora_weights
        other = f"{{set:training.mode}} is {mode}" if mode == "full" else f"{{set:lora.init_lora_weights}} is {start}"
        raise InvalidSettingError(
            f"{{set:training.start_from}} names an adapter, and {other}", fix="Leave one of them out."
        )
    folder = read_adapter_folder(find_adapter(wanted.training.start_from, output, rail))
    targets = folder.config.get("target_modules")
    shape: dict[str, Any] = {
        "r": folder.r,
        "alpha": folder.alpha,
        "use_rslora": bool(folder.config.get("use_rslora")),
        "use_dora": bool(folder.config.get("use_dora")),
        "target_modules": ",".join(sorted(targets)) if isinstance(targets, list) else wanted.lora.target_modules,
    }
    taken = {name: value for name, value in shape.items() if resolved.sources[f"lora.{name}"] != "flag"}
    settings = replace(
        wanted,
        lora=replace(wanted.lora, preset="none", **taken),
        training=replace(wanted.training, start_from=str(folder.path.resolve())),
    )
    sources: dict[str, Source] = dict(resolved.sources)
    for name in taken:
        sources[f"lora.{name}"] = "record"
    return Resolved(settings, MappingProxyType(sources))


def parent_of(adapter: str | None, base: Path) -> str | None:
    """The run that made the adapter that training starts from; None for a new adapter, or one from elsewhere.

    Raises:
        AdapterInvalidError: It was trained on other weights than those in ``base``.
    """
    if adapter is None:
        return None
    if is_other_base(Path(adapter), base):
        raise AdapterInvalidError(
            f"{adapter} was trained on another base than {base}",
            fix="Name the adapter's own base: {set:model.name=NAME}",
        )
    return read_adapter_folder(Path(adapter)).run_id


def plan_extension(store: RunStore, run: str, steps: int, rail: Rail | None = None) -> tuple[Resolved, Notice]:
    """The settings of a run that trains ``steps`` more than a recorded one, and what the user should know of them.

    It starts from the newest weights of that run, with a schedule of its own and a new optimizer.

    Raises:
        AdapterSelectionError: The run is a multi-run, was imported, is running, or has left no weights.
        InvalidSettingError: ``steps`` is below 1.
        RunNotFoundError: As `RunStore.load`.
    """
    record = store.load(run)
    if steps < 1:
        raise InvalidSettingError(f"{steps} more steps are none", fix="Train at least one: {set:steps=+100}")
    if record.kind != "train" or record.is_imported or record.status == "running":
        why = "is running" if record.status == "running" else f"is of the kind {record.kind}, or was imported"
        raise AdapterSelectionError(
            f"run {record.run_id} {why}, and can't be extended",
            fix=f"Train on from its adapter: {{do:train data.path=FILE training.start_from={record.run_id}}}",
        )
    adapter = materialize(Selection(record, store, "last"), rail)
    resolved = from_record(record)
    training = resolved.settings.training
    training = replace(
        training,
        steps=steps,
        epochs=None,
        start_from=str(adapter.resolve()),
        warmup_steps=min(training.warmup_steps, max(0, steps - 1)),
    )
    sources = {
        **resolved.sources,
        "training.steps": "flag",
        "training.epochs": "default",
        "training.start_from": "flag",
    }
    extended = Resolved(replace(resolved.settings, training=training), MappingProxyType(sources))
    done = _step_of(adapter, record)
    rate = f"warms up over {training.warmup_steps} steps to {training.resolved_learning_rate:.2g}"
    text = (
        f"continues run {record.run_id} from its weights after step {done}, for {steps} more steps; the schedule is "
        f"new: the learning rate {rate} and {_COURSE[training.scheduler]}; the optimizer starts fresh"
    )
    return extended, Notice(message=text, details={"parent": record.run_id, "from_step": done, "steps": steps})


def _step_of(adapter: Path, record: RunRecord) -> int | None:
    """The step of the weights in an adapter folder of a run."""
    origin = read_manifest(adapter).get("origin") or {}
    kept_best = record.setting("training.keep") == "best" and record.result.get("best_step")
    step: int | None = origin.get("step") or kept_best or record.result.get("steps")
    return step
