"""Which run continues, from which checkpoint, with which settings; and the settings of a run that is done again."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backpropagate.errors import ResumeDiffersError
from backpropagate.run_hints import UNFINISHED, output_setting, resume_line
from backpropagate.settings import Resolved, from_record
from backpropagate.system import path_exists
from bp_runs.checkpoint_store import Checkpoint, CheckpointFolder
from bp_runs.errors import (
    CheckpointInvalidError,
    CodedError,
    RecordInvalidError,
    ResumeNotFoundError,
    RunActiveError,
)
from bp_runs.events import Notice
from bp_runs.fingerprint import fingerprint_weights
from bp_runs.paths import RECORD_FILE
from bp_runs.record import RunRecord
from bp_runs.recovery import read_copy
from bp_runs.spec import Settings
from bp_runs.store import RunStore
from bp_runs.wording import command_ref, render

_log = logging.getLogger("backpropagate")

_LOOKED_AT = 50  # newest runs of the folder among which the same command is looked for
_OF_THE_CALL = ("training.resume", "training.output_dir", "training.report_to", "training.run_name")


@dataclass(frozen=True, slots=True)
class ResumePlan:
    """An unfinished run and where it continues."""

    record: RunRecord
    checkpoint: Checkpoint | None
    """None: it was cut off before its first one, and begins again."""
    damaged: Mapping[str, str]
    """Newer checkpoints that are not whole, and what is wrong with them."""
    resolved: Resolved
    unasked: bool = False
    """Whether it continues because the same command was given again."""

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self.checkpoint.step if self.checkpoint else 0

    def notices(self, versions: Mapping[str, str]) -> list[Notice]:
        """What the user should know before it continues."""
        place = f"from step {self.step}" if self.checkpoint else "from the beginning: it has no checkpoint"
        other = render("; to start a new one: {set:training.resume=false}") if self.unasked else ""
        found = [Notice(message=f"the run {self.record.run_id} goes on {place}{other}")]
        for name, wrong in self.damaged.items():
            found.append(Notice(message=f"the checkpoint {name} is passed over: {wrong}", level="warning"))
        changed = {n: f"{v} → {versions.get(n)}" for n, v in self.record.versions.items() if versions.get(n) != v}
        if changed:
            told = ", ".join(f"{name} {change}" for name, change in changed.items())
            message = f"other versions than the run began with, so the rest may differ in the last bits: {told}"
            found.append(Notice(message=message, level="warning", details=changed))
        return found


def find_record(store: RunStore, partial_id: str | None) -> RunRecord:
    """The named run or multi-run, or the newest one that can be resumed.

    A damaged record is rebuilt from the run's checkpoints, which is logged.

    Raises:
        ResumeNotFoundError: There is none, or it cannot be resumed.
        RunActiveError: It is being trained right now; without an id, the newest one is.
        RecordInvalidError: Its record is damaged and cannot be rebuilt; no older run is taken for it.
        RunNotFoundError: As `RunStore.find`.
    """
    record = _load_or_rebuild(store, store.find(partial_id)) if partial_id else _newest(store)
    if record.is_imported:
        raise ResumeNotFoundError(
            f"the run {record.run_id} was imported: its record has not all that it was made with",
            fix="Train from scratch: {do:train data.path=FILE model.name=NAME}",
        )
    if record.parent and record.parent.get("relation") == "member":
        raise ResumeNotFoundError(
            f"the run {record.run_id} is one of the multi-run {record.parent['run_id']} and does not go on alone",
            fix=f"Resume the multi-run: {resume_line(record.parent['run_id'], store.output)}",
        )
    if record.status == "diverged":
        raise ResumeNotFoundError(
            f"the run {record.run_id} diverged and would do so again",
            fix=f"Run it again with a lower rate: {_replay(record, store, **{'training.learning_rate': 5e-5})}",
        )
    if record.status == "completed":
        raise ResumeNotFoundError(
            f"the run {record.run_id} is finished",
            fix=f"Run it again with other settings: {_replay(record, store, **{'training.steps': 200})}",
        )
    return record


def _replay(record: RunRecord, store: RunStore, **settings: object) -> str:
    return command_ref("replay", record.run_id, **output_setting(store.output), **settings)


def prepare(store: RunStore, record: RunRecord) -> ResumePlan:
    """Where an unfinished run continues, and with what.

    Raises:
        CheckpointInvalidError: It has checkpoints, and none is whole.
        UnknownSettingError, InvalidSettingError: As `backpropagate.settings.from_record`.
    """
    checkpoint, damaged = CheckpointFolder(store.folder(record.run_id)).newest_whole()
    return ResumePlan(record, checkpoint, damaged, from_record(record))


def find_same(store: RunStore, resolved: Resolved, ranks: int = 1) -> ResumePlan | None:
    """The newest run of the same settings, where it is unfinished and has a whole checkpoint.

    Args:
        ranks: How many processes train together; a run of another number is another run.
    """
    settings = resolved.settings
    for row in store.list_newest(_LOOKED_AT)[0]:
        if _is_damaged(row):
            found = _find_same_damaged(store, row["run_id"], settings)
            if found is None:
                continue
            return _with_checkpoint(store, found) if found.status in UNFINISHED else None
        if (row["model"], row["data"], row["kind"]) != (settings.model.name, settings.data.path, "train"):
            continue
        try:
            record = store.load(row["run_id"])
            recorded = from_record(record)
        except CodedError:
            continue
        if (record.parent or {}).get("relation") == "member" or record.hardware.get("ranks", 1) != ranks:
            continue
        if not differences(settings, recorded.settings):
            return _with_checkpoint(store, record) if record.status in UNFINISHED else None
    return None


def base_notices(record: RunRecord, folder: Path) -> list[Notice]:
    """A warning where a run that is done again had other weights in its base model than ``folder`` has now."""
    weights = record.base.get("weights")
    if weights is None or weights == fingerprint_weights(folder):
        return []
    text = f"the weights of the base model in {folder} changed since the run {record.run_id}, so the result will differ"
    return [Notice(message=text, level="warning")]


def pin(settings: Settings, record: RunRecord | None) -> Settings:
    """``wanted`` with the Hub's commits that the recorded run was made of, where it asks for the same model and data.

    A branch may have moved since; what the record does not know stays as requested.
    """
    if record is None:
        return settings
    model, data = (found and found.get("revision") for found in (record.model, record.data))
    if model and _asks_alike(settings, record, "model.name", "model.revision"):
        settings = replace(settings, model=replace(settings.model, revision=model))
    if data and _asks_alike(settings, record, "data.path", "data.revision"):
        settings = replace(settings, data=replace(settings.data, revision=data))
    return settings


def _asks_alike(settings: Settings, record: RunRecord, *keys: str) -> bool:
    flat = settings.to_flat()
    return all(flat[key] == record.setting(key) for key in keys)


def require_same(resolved: Resolved, recorded: Resolved, run_id: str) -> None:
    """Reject flags that ask for something else than the run's record.

    Raises:
        ResumeDiffersError: Which ones, with both values.
    """
    changed = {
        key: values
        for key, values in differences(resolved.settings, recorded.settings).items()
        if resolved.sources[key] == "flag"
    }
    if changed:
        told = ", ".join(f"{key} is {now} and was {before}" for key, (now, before) in changed.items())
        replay = command_ref("replay", run_id, **{key: now for key, (now, _) in changed.items()})
        raise ResumeDiffersError(
            f"the run {run_id} was begun with other settings",
            cause=told,
            fix=f"Resume it without these settings, or run it again with them: {replay}",
        )


def differences(now: Settings, before: Settings) -> dict[str, tuple[Any, Any]]:
    """Settings that decide what is trained and are not alike: both values by dotted key."""
    old, new = _comparable(before), _comparable(now)
    chosen = ("lora.r", "lora.target_modules") if now.lora.preset == before.lora.preset == "auto" else ()
    return {key: (new[key], old[key]) for key in new if new[key] != old[key] and key not in chosen}


def _comparable(settings: Settings) -> dict[str, Any]:
    flat = settings.to_flat() | {"training.learning_rate": settings.training.resolved_learning_rate}
    for key in ("model.name", "data.path"):
        if path_exists(flat[key]):
            flat[key] = str(Path(flat[key]).resolve())
    return {key: value for key, value in flat.items() if key not in _OF_THE_CALL}


def _newest(store: RunStore) -> RunRecord:
    """The newest run that can be resumed, if no newer one is being trained or has a damaged record."""
    all_rows = store.list_runs()
    multi_runs = {row["run_id"] for row in all_rows if row["kind"] == "multi-run"}
    rows = [row for row in all_rows if row["parent"] not in multi_runs]  # a multi-run answers for its members
    for place, row in enumerate(rows):
        if row["status"] == "running":
            raise _active(store, row, rows[place + 1 :])
        if _is_damaged(row):
            record = _load_or_rebuild(store, row["run_id"], rows[place + 1 :])
        elif row["status"] in UNFINISHED:
            record = store.load(row["run_id"])
        else:
            continue
        is_member = (record.parent or {}).get("relation") == "member"
        if record.status in UNFINISHED and not is_member and not record.is_imported:
            return record
    fix = f"See the runs and how they ended: {command_ref('list-runs', **output_setting(store.output))}"
    raise ResumeNotFoundError(f"no unfinished run in {store.output}", fix=fix)


def _is_damaged(row: Mapping[str, Any]) -> bool:
    return bool(row["error"] == RecordInvalidError.code)


def _active(store: RunStore, row: Mapping[str, Any], older: Sequence[Mapping[str, Any]]) -> RunActiveError:
    """That the newest run needs no resuming: who trains it, and what can be done."""
    record = store.load(row["run_id"])
    here = record.host == platform.node()
    stop = f"kill -INT {record.pid}" if here else f"press Ctrl-C on {record.host}"
    take_over = command_ref("resume", record.run_id, **output_setting(store.output), take_over=True)
    gone = "" if here else f"; if that machine is gone for good: {take_over}"
    watch = command_ref("show-run", record.run_id, **output_setting(store.output))
    return RunActiveError(
        f"the run {record.run_id} is being trained right now by process {record.pid} on {record.host}",
        fix=f"Watch it: {watch}; save and stop it: {stop}{gone}{_older_hint(store, older)}",
    )


def _older_hint(store: RunStore, older: Sequence[Mapping[str, Any]]) -> str:
    found = next((row["run_id"] for row in older if row["status"] in UNFINISHED and not _is_damaged(row)), None)
    return "" if found is None else f"; resume the older run: {resume_line(found, store.output)}"


def _load_or_rebuild(store: RunStore, run_id: str, older: Sequence[Mapping[str, Any]] = ()) -> RunRecord:
    """The run's record; a damaged one is rebuilt from its checkpoints.

    Raises:
        RecordInvalidError: It cannot be rebuilt.
    """
    try:
        return store.load(run_id)
    except RecordInvalidError as damage:
        try:
            record = store.rebuild_record(run_id)
        except RecordInvalidError as error:
            raise RecordInvalidError(
                f"the record of the run {run_id} is damaged, and no checkpoint has a copy of it",
                cause=damage.message,
                fix=f"Restore {store.folder(run_id) / RECORD_FILE} from a backup, or delete the run: "
                f"{command_ref('runs rm', run_id, **output_setting(store.output))}{_older_hint(store, older)}",
            ) from error
        _log.warning("the record of the run %s was damaged: %s", run_id, record.note)
        return record


def _find_same_damaged(store: RunStore, run_id: str, settings: Settings) -> RunRecord | None:
    """A run with a damaged record, rebuilt, if it has these settings; None if not, or if nobody can tell."""
    copy = read_copy(store.folder(run_id))
    if copy is None:
        hint = render(command_ref("runs rm", run_id, **output_setting(store.output)))
        _log.warning("the record of the run %s is damaged; if it was this run, it is not resumed (%s)", run_id, hint)
        return None
    try:
        is_same = not differences(settings, from_record(copy.record).settings)
    except CodedError:
        return None
    return _load_or_rebuild(store, run_id) if is_same else None


def _with_checkpoint(store: RunStore, record: RunRecord) -> ResumePlan | None:
    try:
        found = prepare(store, record)
    except CheckpointInvalidError:
        return None
    return replace(found, unasked=True) if found.checkpoint else None
