"""Data as Python holds it: a path or a Hub name stays one; examples in memory become a file of the output folder.

The file, ``<output>/snapshots/<hash>.jsonl``, is named by its content. So the same examples are the same file, the
run's record names it, and `resume`, `extend` and `replay` can read it in a later process.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import orjson

from bp_data.errors import DatasetEmptyError, DatasetInvalidError
from bp_runs.files import coded_disk_errors, fsync_file, rename

Data: TypeAlias = str | Path | Iterable[Mapping[str, Any]]
"""A file, folder or Hub dataset by name; or examples: a list of dicts, generator, `datasets.Dataset` or DataFrame."""

SNAPSHOTS = "snapshots"
_OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS


def is_in_memory(data: object) -> bool:
    """Whether ``data`` holds the examples themselves, and does not name them."""
    if data is None or isinstance(data, str | os.PathLike):
        return False
    return not (isinstance(data, list | tuple) and data and all(isinstance(one, str | os.PathLike) for one in data))


def snapshot(data: object, output: Path) -> Path:
    """Write examples to a file of the output folder, streaming; returns the file.

    Args:
        data: Anything that `is_in_memory`. Values are written as JSON: numpy numbers as numbers, NaN as null, dates and
            other objects as text.
        output: The output folder.

    Raises:
        DatasetInvalidError: It holds something else than examples. The message names place and type, never a value.
        DatasetEmptyError: It has no examples.
        DiskFullError, OutputNotWritableError: The file cannot be written.
    """
    folder = output / SNAPSHOTS
    digest, count = hashlib.sha256(), 0
    with coded_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{os.getpid()}-{id(data)}.partial"
        try:
            with partial.open("wb") as file:
                for line in _lines(data):
                    digest.update(line)
                    file.write(line)
                    count += 1
            if not count:
                raise DatasetEmptyError("the data has no examples", fix="Pass at least one example.")
            target = folder / f"{digest.hexdigest()[:16]}.jsonl"
            fsync_file(partial)
            rename(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    return target


def _lines(data: object) -> Iterator[bytes]:
    for number, row in enumerate(_rows(data), start=1):
        if not isinstance(row, Mapping):
            raise DatasetInvalidError(
                f"example {number} is a {type(row).__name__}, not a dict",
                fix='Pass dicts, such as {"prompt": …, "completion": …} or {"text": …}.',
            )
        yield _encode(dict(row)) + b"\n"


def _rows(data: object) -> Iterable[object]:
    """The examples of a list, generator, `datasets.Dataset`, or pandas or polars DataFrame."""
    kind = type(data).__name__
    if isinstance(data, Mapping):
        keys = ", ".join(map(str, list(data)[:5]))
        raise DatasetInvalidError(
            f"the data is a {kind} with the keys {keys}", fix='Pass one split, data["train"]; or a list of dicts.'
        )
    if hasattr(data, "iter_rows"):  # polars
        rows: Iterable[object] = data.iter_rows(named=True)
        return rows
    if hasattr(data, "itertuples") and hasattr(data, "columns"):  # pandas; a row at a time keeps memory flat
        names = [str(name) for name in data.columns]
        return (dict(zip(names, values, strict=True)) for values in data.itertuples(index=False, name=None))
    if not isinstance(data, Iterable):
        raise DatasetInvalidError(
            f"the data is a {kind}", fix="Pass a path, a Hub name, a list of dicts, a Dataset or a DataFrame."
        )
    return data


def _encode(row: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(row, default=str, option=_OPTIONS)
    except TypeError:  # integers of more than 64 bits, which JSON can hold
        return json.dumps(_plain(row), ensure_ascii=False).encode()


def _plain(value: Any) -> Any:
    """A value as JSON has it; as orjson would write it, but for large integers, which stay."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, int):
        return value
    return orjson.loads(orjson.dumps(value, default=str, option=_OPTIONS))
