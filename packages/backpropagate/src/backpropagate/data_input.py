"""Data as Python holds it: a path or a Hub name stays one; examples in memory become a file of the output folder.

The file, ``<output>/snapshots/<hash>.jsonl``, is named by its content. So the same examples are the same file, the
run's record names it, and `resume`, `extend` and `replay` can read it in a later process.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import orjson

from backpropagate.errors import ModelInvalidError
from bp_data.errors import DatasetEmptyError, DatasetInvalidError
from bp_runs.files import coded_disk_errors, fsync_file, publish_folder, rename, sha256_file

Data: TypeAlias = str | Path | Iterable[Mapping[str, Any]]
"""A file, folder or Hub dataset by name; or examples: a list of dicts, generator, `datasets.Dataset` or DataFrame."""

SNAPSHOTS = "snapshots"
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
)
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


def is_loaded_model(model: object) -> bool:
    """Whether this is a model of transformers, and not the name of one."""
    return not isinstance(model, str | os.PathLike | None) and hasattr(model, "save_pretrained")


def save_model(model: Any, tokenizer: Any, output: Path) -> Path:
    """Save a loaded model and its tokenizer to a folder of the output folder, which is named by its content.

    Args:
        model: A transformers model.
        tokenizer: Its tokenizer; None: the files next to the weights that it was loaded from.
        output: The output folder.

    Raises:
        ModelInvalidError: It has adapters on it, or no tokenizer is known.
        DiskFullError, OutputNotWritableError: It cannot be saved.
    """
    if hasattr(model, "peft_config"):
        raise ModelInvalidError(
            "the model has adapters on it",
            fix="Pass the base, and train from the adapter: {set:training.start_from=./lora}",
        )
    source = Path(getattr(model.config, "name_or_path", "") or ".")
    files = [file for name in _TOKENIZER_FILES for file in source.glob(name)] if source.is_dir() else []
    if tokenizer is None and not files:
        raise ModelInvalidError("the model comes without a tokenizer", fix="Pass it too: Trainer(model, tokenizer=…)")
    folder = output / SNAPSHOTS
    with coded_disk_errors(folder), publish_folder(folder / "model") as partial:
        model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        for file in files if tokenizer is None else ():
            shutil.copy2(file, partial / file.name)
    files_now = sorted((folder / "model").iterdir())
    digest = hashlib.sha256("".join(f"{file.name} {sha256_file(file)}\n" for file in files_now).encode())
    named = folder / f"model-{digest.hexdigest()[:16]}"
    if named.is_dir():
        shutil.rmtree(folder / "model")
    else:
        rename(folder / "model", named)
    return named


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
