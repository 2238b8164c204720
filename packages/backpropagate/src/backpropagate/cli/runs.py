"""`backprop list-runs`, `show-run`, and `runs`: list, show, remove, tag, note, protect and import runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from backpropagate.cli.flags import Json, Output, output_folder
from backpropagate.cli.list_runs import print_list
from backpropagate.cli.output import print_json
from backpropagate.cli.show_run import print_run
from backpropagate.errors import HistoryInvalidError
from backpropagate.import_1x import import_history
from bp_runs.checkpoint_store import CheckpointFolder
from bp_runs.errors import RunStatus
from bp_runs.index import older_histories
from bp_runs.record import RunRecord
from bp_runs.store import RunStore


def list_runs(
    *,
    output: Output = None,
    status: RunStatus | None = None,
    tag: str | None = None,
    limit: int = 20,
    json: Json = False,
) -> int:
    """List the runs of an output folder, newest first.

    Parameters
    ----------
    status: str
        Only runs that ended so.
    tag: str
        Only runs with this tag.
    limit: int
        At most so many; 0: all.
    """
    return print_list(output_folder(output), status=status, tag=tag, limit=limit, json=json)


def show_run(run: str | None = None, *, output: Output = None, json: Json = False) -> int:
    """Show one run in full: its settings, what it used, how it went and how it ended.

    Parameters
    ----------
    run: str
        The run's id, or a part of it that only one run has; default: the newest run.
    """
    return print_run(output_folder(output), run, json=json)


def rm(*runs: str, output: Output = None, json: Json = False) -> int:
    """Delete runs with their adapters and checkpoints; OUTPUT/lora stays.

    Parameters
    ----------
    runs: str
        Ids, or parts that only one run has.
    """
    store = RunStore(output_folder(output))
    found = list(dict.fromkeys(store.find(run) for run in runs))  # all of them, before the first is gone
    for run_id in found:
        store.remove(run_id)
    _tell("runs-rm", {"removed": found}, f"  removed   {', '.join(found) or 'nothing'}", json=json)
    return 0


def tag(
    run: str,
    *tags: str,
    remove: Annotated[bool, Parameter(negative="")] = False,
    output: Output = None,
    json: Json = False,
) -> int:
    """Give a run tags, or take them away; list-runs --tag finds them.

    Parameters
    ----------
    run: str
        The run's id, or a part of it that only one run has.
    tags: str
        The words.
    remove: bool
        Take them away.
    """

    def change(record: RunRecord) -> None:
        kept = [tag for tag in record.tags if tag not in tags]
        record.tags = kept if remove else [*kept, *dict.fromkeys(tags)]

    store = RunStore(output_folder(output))
    record = store.update(store.find(run), change)
    told = f"  tags      {record.run_id}: {', '.join(record.tags) or 'none'}"
    _tell("runs-tag", {"run_id": record.run_id, "tags": record.tags}, told, json=json)
    return 0


def note(run: str, text: str, *, output: Output = None, json: Json = False) -> int:
    """Write a note to a run; an empty one takes it away.

    Parameters
    ----------
    run: str
        The run's id, or a part of it that only one run has.
    text: str
        What show-run is to show.
    """
    store = RunStore(output_folder(output))
    record = store.update(store.find(run), lambda found: setattr(found, "note", text))
    _tell("runs-note", {"run_id": record.run_id, "note": record.note}, f"  noted     {record.run_id}", json=json)
    return 0


def name(run: str, title: str, *, output: Output = None, json: Json = False) -> int:
    """Name a run, for list-runs and the web UI; an empty name removes it.

    Parameters
    ----------
    run: str
        The run's id, or a part of it that only one run has.
    title: str
        The name.
    """
    store = RunStore(output_folder(output))
    record = store.update(store.find(run), lambda found: setattr(found, "title", title))
    _tell("runs-name", {"run_id": record.run_id, "title": record.title}, f"  named     {record.run_id}", json=json)
    return 0


def protect(run: str, *, step: int, output: Output = None, json: Json = False) -> int:
    """Keep a checkpoint for good; newer ones no longer take its place.

    Parameters
    ----------
    run: str
        The run's id, or a part of it that only one run has.
    step: int
        The checkpoint's step; show-run lists them.
    """
    store = RunStore(output_folder(output))
    run_id = store.find(run)
    kept = CheckpointFolder(store.folder(run_id)).protect(step)
    body = {"run_id": run_id, "step": kept.step, "checkpoint": str(kept.path)}
    _tell("runs-protect", body, f"  protected {kept.path}", json=json)
    return 0


def import_(file: Path | None = None, *, output: Output = None, json: Json = False) -> int:
    """Import runs from backpropagate 1.x; safe to repeat.

    Parameters
    ----------
    file: Path
        Its run_history.json; default: the one in the output folder.
    """
    store = RunStore(output_folder(output))
    files = [file] if file else older_histories(store.output)
    if not files:
        raise HistoryInvalidError(f"there is no run history of backpropagate 1.x in {store.output}")
    done = [import_history(store, found) for found in files]
    added = [run_id for part in done for run_id in part.added]
    known = [run_id for part in done for run_id in part.known]
    left_out = [place for part in done for place in part.left_out]
    told = [f"  imported  {len(added)} runs; {len(known)} were there already"]
    told += [f"  left out  {place}: no run" for place in left_out]
    _tell("runs-import", {"imported": added, "known": known, "left_out": left_out}, "\n".join(told), json=json)
    return 0


def _tell(kind: str, body: dict[str, object], line: str, *, json: bool) -> None:
    if json:
        print_json(kind, body)
    else:
        print(line)  # noqa: T201
