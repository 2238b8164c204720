"""The index ``run_history.json``: one summary row a run, so that listing ten thousand runs need not open each record.

    run_history.json         {"schema": …, "runs": [row, …]}, a row a line
    .run_history.journal     rows since then, a line each; joined into the index when it has grown to an eighth of it

Each row has the ``stamp`` of the record that it was made from. A row whose stamp does not hold is rebuilt, so that an
index that is lost, damaged, or older than the folders gives right answers all the same: the folders are the truth.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import orjson

from bp_runs import paths
from bp_runs.errors import RecordInvalidError
from bp_runs.files import coded_disk_errors, publish_bytes, rename
from bp_runs.record import RunRecord, read_record

INDEX_SCHEMA = "backpropagate.run_history/2"
_WRITTEN_WHOLE = 128 * 2**10  # bytes of an index that costs no more than a millisecond to write
_JOURNAL_SHARE = 8
_STAMP = "stamp"

Row = dict[str, Any]
by_age = itemgetter("sequence", "created_at", "run_id")
"""A row's key for sorting from the oldest to the newest: the order in which the store began them, whatever the clock
said; runs that were not counted go before, by the clock."""
_UNKNOWN = 2**53
"""Sequence of a run whose record cannot be read and that nothing else tells the place of: taken for the newest, since
an older run must not be taken for it in silence."""
_ROW_KEYS = RunRecord(run_id="").to_summary().keys() | {_STAMP}


def read_rows(output: Path) -> tuple[list[Row], bool]:
    """A row for every run folder, in the order of their ids, and whether the index has all that can be read."""
    known, ids = _read_index(output), run_ids(output)
    return _look(output, ids, ids, known)


def read_newest(output: Path, count: int) -> tuple[list[Row], bool, int]:
    """Rows of the newest ``count`` runs, and perhaps of others; as `read_rows`, as far as was looked; runs in all."""
    known, ids = _read_index(output), run_ids(output)
    there = sorted((known[run_id] for run_id in ids if run_id in known), key=by_age, reverse=True)
    asked = [row["run_id"] for row in there[:count]] + [run_id for run_id in ids if run_id not in known]
    return *_look(output, asked, ids, known), len(ids)


def _look(output: Path, asked: Sequence[str], ids: Sequence[str], known: Mapping[str, Row]) -> tuple[list[Row], bool]:
    rows = _current(output, asked, known)
    anew = (run_id for run_id, row in rows.items() if known.get(run_id) is not row)
    is_whole = known.keys() <= set(ids) and not any(_is_readable(rows[i]) for i in anew)
    return _take_off_stamps(rows), is_whole


def put_row(output: Path, record: RunRecord) -> None:
    """Let the index have this record's row. The caller holds the store's lock and has written the record.

    Raises:
        DiskFullError, OutputNotWritableError: The record is written all the same, and the next look finds it.
    """
    row = {**record.to_summary(), _STAMP: _stamp(f"{output}/runs/{record.run_id}/{paths.RECORD_FILE}")}
    index, journal = paths.index_file(output), paths.journal_file(output)
    size = _size(index)
    if size < _WRITTEN_WHOLE or _size(journal) * _JOURNAL_SHARE > size:
        write_rows(output, {**_read_index(output), record.run_id: row}.values())
        return
    with coded_disk_errors(journal), journal.open("ab", buffering=0) as file:
        # A line that a killed process left torn must not swallow this one.
        file.write(b"\n" + orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))


def rebuild(output: Path) -> list[Row]:
    """Rebuild the index, from the folders where it does not agree with them. The caller holds the store's lock."""
    known = _read_index(output)
    rows = _current(output, run_ids(output), known)
    # Of a damaged record what was known stays, with its stamp that no longer holds: its place among the others.
    write_rows(output, [row if _is_readable(row) else known.get(run_id, row) for run_id, row in rows.items()])
    return _take_off_stamps(rows)


def next_sequence(output: Path) -> int:
    """The number of the run that begins now. The caller holds the store's lock.

    Raises:
        DiskFullError, OutputNotWritableError: It cannot be noted.
    """
    file = paths.sequence_file(output)
    try:
        last = int(file.read_bytes())
    except (OSError, ValueError):
        last = max((row["sequence"] for row in read_rows(output)[0] if row["sequence"] < _UNKNOWN), default=0)
    publish_bytes(file, str(last + 1).encode())
    return last + 1


def write_rows(output: Path, rows: Iterable[Row]) -> None:
    """Publish the index; rows of unreadable records are left out, in case the records are repaired.

    A list that an older tool has left under this name is set aside first.
    """
    lines = [orjson.dumps(row) for row in rows if _is_readable(row)]
    head = b'{"schema": "' + INDEX_SCHEMA.encode() + b'", "runs": [\n'
    _set_older_aside(paths.index_file(output))
    publish_bytes(paths.index_file(output), head + b",\n".join(lines) + b"\n]}\n", durable=False)
    with contextlib.suppress(FileNotFoundError):
        paths.journal_file(output).unlink()


def run_ids(output: Path) -> list[str]:
    """Names of the run folders, sorted; hidden ones are being made or removed."""
    try:
        with os.scandir(paths.runs_folder(output)) as entries:
            return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def older_histories(output: Path) -> list[Path]:
    """Run histories of the older tool that are in the folder: the index's own name first, then those set aside."""
    index = paths.index_file(output)
    aside = sorted(output.glob("run_history.older*.json")) if output.is_dir() else []
    return [index, *aside] if _is_list(index) else aside


def _current(output: Path, ids: Iterable[str], known: Mapping[str, Row]) -> dict[str, Row]:
    """Rows by id: the known ones whose stamps hold, the others read from the records."""
    rows = {}
    runs = str(paths.runs_folder(output))
    for run_id in ids:
        stamp = _stamp(f"{runs}/{run_id}/{paths.RECORD_FILE}")
        row = known.get(run_id)
        rows[run_id] = row if row and row[_STAMP] == stamp else _read_row(output, run_id, row) | {_STAMP: stamp}
    return rows


def _read_row(output: Path, run_id: str, known: Row | None) -> Row:
    folder = paths.run_folder(output, run_id)
    try:
        return read_record(folder).to_summary()
    except RecordInvalidError as error:
        row = RunRecord(run_id=run_id, status="failed", created_at="", sequence=_UNKNOWN, error=error.to_dict())
        return row.to_summary() | (_place(known) if known else _read_place(folder))


def _read_place(folder: Path) -> Row:
    """The place of a run whose record is damaged, as its checkpoints tell it; empty where they do not."""
    from bp_runs.recovery import read_copy  # a list of whole records needs none

    copy = read_copy(folder)
    return _place(copy.record.to_summary()) if copy else {}


def _place(row: Row) -> Row:
    return {name: row[name] for name in ("sequence", "created_at", "parent", "kind")}


def _read_index(output: Path) -> dict[str, Row]:
    """Rows by id, as far as index and journal can be read."""
    rows: dict[str, Row] = {}
    with contextlib.suppress(OSError, orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        found = orjson.loads(paths.index_file(output).read_bytes())["runs"]
        rows = {row["run_id"]: row for row in found if row.keys() >= _ROW_KEYS}
    with contextlib.suppress(OSError):
        for line in paths.journal_file(output).read_bytes().splitlines():
            with contextlib.suppress(orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
                row = orjson.loads(line)
                if row.keys() >= _ROW_KEYS:
                    rows[row["run_id"]] = row
    return rows


def _is_readable(row: Row) -> bool:
    return bool(row["error"] != RecordInvalidError.code)


def _take_off_stamps(rows: Mapping[str, Row]) -> list[Row]:
    for row in rows.values():
        del row[_STAMP]
    return list(rows.values())


def _stamp(record: str) -> list[int]:
    """Time and size of a run's record; they change with every publication of it, whatever the clock does."""
    try:
        found = os.stat(record)  # noqa: PTH116  # ten thousand Paths take their time
    except OSError:
        return [0, 0, 0]
    return [found.st_mtime_ns, found.st_size, found.st_ino]


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _is_list(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(64).lstrip().startswith(b"[")
    except OSError:
        return False


def _set_older_aside(index: Path) -> None:
    if not _is_list(index):
        return
    names = (f"run_history.older{n or ''}.json" for n in range(1000))
    free = next(index.with_name(name) for name in names if not index.with_name(name).exists())
    with coded_disk_errors(index):
        rename(index, free)
