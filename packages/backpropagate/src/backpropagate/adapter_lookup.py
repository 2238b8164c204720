"""What a command means by an adapter: a folder, a run, or one of a run's checkpoints.

./output/lora        a folder
9f2c1a               a run of the output folder, by any part of its id that only one has: its finished adapter
9f2c1a@50            its checkpoint of step 50
9f2c1a@best          its weights with the lowest validation loss
9f2c1a@last          its newest weights: the finished adapter, else the newest checkpoint
./week1/9f2c1a@50    a run of another output folder
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from backpropagate import rails, system
from backpropagate.errors import AdapterSelectionError
from bp_runs.adapter import read_manifest
from bp_runs.checkpoint_store import Checkpoint, CheckpointFolder
from bp_runs.errors import RunNotFoundError
from bp_runs.paths import ADAPTER_NAME, MODEL_NAME, runs_folder
from bp_runs.rail import Rail, WritesAdapters
from bp_runs.record import RunRecord
from bp_runs.store import RunStore
from bp_runs.wording import command_ref

ADAPTERS = "adapters"
"""The run's folder of adapters that were made of its checkpoints."""
_FILES = (".gguf", ".safetensors")
Which = int | Literal["best", "last"] | None


@dataclass(frozen=True, slots=True)
class Selection:
    """A run that was selected, and which of its weights."""

    record: RunRecord
    store: RunStore
    which: Which

    @property
    def folder(self) -> Path:
        """The run's."""
        return self.store.folder(self.record.run_id)


def find_adapter(target: str | Path, output: Path, rail: Rail | None = None) -> Path:
    """The adapter's (or model's) folder; a checkpoint is written as one first, once.

    Args:
        target: As the module says.
        output: The output folder whose runs may be named alone.
        rail: What made the run; default: the installed one of its name.

    Raises:
        AdapterSelectionError: The run has no such step, or no adapter yet.
        RunNotFoundError: No run, or several, have the id.
        CodedError: The checkpoint is damaged or holds no adapter.
    """
    path = system.to_path(target)
    is_path = len(path.parts) > 1 and not runs_folder(path.parent).is_dir()
    if path.exists() or path.suffix in _FILES or is_path:
        return path
    return materialize(select_run(str(target), output), rail)


def select_run(target: str, output: Path) -> Selection:
    """The run that is meant, and which of its weights.

    Raises:
        AdapterSelectionError: What follows the ``@`` is no step, ``best`` or ``last``.
        RunNotFoundError: As `RunStore.load`.
    """
    name, at, text = target.rpartition("@")
    if not at:
        name, text = target, ""
    which: Which = None
    if text in ("best", "last"):
        which = "best" if text == "best" else "last"
    elif text.isdigit():
        which = int(text)
    elif at:
        raise AdapterSelectionError(
            f"{target!r}: {text!r} is no step", fix=f"Write a step, best or last: {name}@50, {name}@best"
        )
    path = Path(name)
    store = RunStore(path.parent if len(path.parts) > 1 else output)
    try:
        return Selection(store.load(path.name), store, which)
    except RunNotFoundError as error:
        if error.details.get("matches"):
            raise
        raise RunNotFoundError(
            f"there is no folder {target}, and {error.message}", fix=error.fix, details=error.details
        ) from error


def materialize(selection: Selection, rail: Rail | None = None) -> Path:
    """The folder of what was selected; raises as `find_adapter`."""
    record, which = selection.record, selection.which
    for name in (MODEL_NAME, ADAPTER_NAME):
        finished = selection.folder / name
        steps = record.result.get("steps")
        best = record.result.get("best_step")
        is_best = record.setting("training.keep") == "best" and best is not None
        is_meant = which is None or (which == "best" and (is_best or best is None))
        is_meant = (
            is_meant or (which in ("last", steps) and not (is_best and best != steps)) or (is_best and which == best)
        )
        if finished.is_dir() and is_meant:
            return finished
    finished = selection.folder / ADAPTER_NAME
    if which == "last" and finished.is_dir() and not CheckpointFolder(selection.folder).read():
        return finished
    return _write(selection, *_find_checkpoint(selection), rail)


def _find_checkpoint(selection: Selection) -> tuple[Checkpoint, bool]:
    """The checkpoint that has what was selected, and whether its best weights are meant."""
    which, folder = selection.which, CheckpointFolder(selection.folder)
    whole = [checkpoint for checkpoint in folder.read() if checkpoint.damage() is None]
    if not whole:
        raise _missing(selection, whole)
    if which == "best":
        with_best = next((c for c in whole if "best.safetensors" in c.files), None)
        return (with_best, True) if with_best else (whole[0], False)
    if which is None or which == "last":
        return whole[0], False
    found = next((checkpoint for checkpoint in whole if checkpoint.step == which), None)
    if found is None:
        raise _missing(selection, whole)
    return found, False


def _missing(selection: Selection, whole: list[Checkpoint]) -> AdapterSelectionError:
    run_id = selection.record.run_id
    steps = ", ".join(str(step) for step in sorted({checkpoint.step for checkpoint in whole}))
    kept = f"it has checkpoints of step {steps}" if steps else "it has no checkpoints"
    wanted = "an adapter" if selection.which is None else f"{selection.which}"
    name = run_id if selection.store.output == Path("output") else selection.store.output / run_id
    example = f"{name}@{whole[0].step}" if whole else str(name)
    finished = (selection.folder / ADAPTER_NAME).is_dir()
    usable = f"Use one of them: {command_ref('export', example)}"
    hint = usable if whole or finished else f"Train it: {command_ref('resume', run_id)}"
    return AdapterSelectionError(
        f"run {run_id} has no {wanted}",
        cause=f"{kept}; older ones are removed unless they are protected",
        fix=hint,
        details={"run_id": run_id, "steps": sorted({checkpoint.step for checkpoint in whole})},
    )


def _write(selection: Selection, checkpoint: Checkpoint, best: bool, rail: Rail | None) -> Path:
    name = f"step-{checkpoint.step}" + ("-best" if best else "")
    folder = selection.folder / ADAPTERS / name
    origin: Mapping[str, object] = read_manifest(folder).get("origin", {}) if folder.is_dir() else {}
    if origin.get("checkpoint") == checkpoint.path.name:
        return folder
    writer: object = rail or rails.find_rail(checkpoint.rail)
    if not isinstance(writer, WritesAdapters):
        raise AdapterSelectionError(f"the backend {checkpoint.rail} cannot write a checkpoint as an adapter")
    folder.parent.mkdir(exist_ok=True)
    writer.write_adapter(checkpoint, selection.record, folder, best=best)
    return folder
