"""What `backprop data` and `validate` read: files, folders, data sets of the Hub, and a model's tokenizer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from backpropagate import catalogue, settings, system
from backpropagate.cli.flags import flag_names
from bp_data.columns import ReadOptions
from bp_data.folders import find_files
from bp_runs.spec import DataSpec, Settings

Model = Annotated[str | None, Parameter(name=flag_names(settings.all_settings()["model.name"]))]


def _named(key: str) -> Parameter:
    setting = settings.all_settings()[key]
    return Parameter(name=flag_names(setting), help=setting.help, negative_iterable="")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which part of a data set is meant, and how its rows are read."""

    subset: Annotated[str | None, _named("data.subset")] = None
    split: Annotated[str | None, _named("data.split")] = None
    data_revision: Annotated[str | None, _named("data.revision")] = None
    columns: Annotated[list[str] | None, _named("data.columns")] = None
    ignore_columns: Annotated[list[str] | None, _named("data.ignore_columns")] = None
    encoding: Annotated[str | None, _named("data.encoding")] = None


def find_data(file: str, given: DataOptions | None = None, *, quiet: bool = False) -> tuple[Path, ReadOptions]:
    """The local file or folder of what was typed, and how its rows are read; ``quiet`` as in `find_file`.

    Raises:
        CodedError: As `find_file`, or a setting is wrong.
    """
    data = resolve_settings({**asdict(given or DataOptions()), "data": file}).data
    return find_file(data, quiet=quiet), read_options(data)


def find_file(data: DataSpec, *, quiet: bool = False) -> Path:
    """The local file or folder of the settings; ``quiet`` for commands that show themselves which files are read.

    Raises:
        CodedError: As `catalogue.find_rows`.
    """
    return catalogue.find_rows(data, os.environ, offline=system.is_offline(os.environ), quiet=quiet).path


def read_options(data: DataSpec) -> ReadOptions:
    """How the rows of the settings' data are read.

    Raises:
        InvalidSettingError: As `ReadOptions.parse`.
    """
    return ReadOptions.parse(data.columns, data.ignore_columns, data.encoding)


def describe_files(path: Path) -> list[str]:
    """Of a folder, a line for the files that are read and one for each file that is not; nothing of a file."""
    if not path.is_dir():
        return []
    files = find_files(path)
    taken = ", ".join(file.relative_to(path).as_posix() for file in files.taken)
    left = [f"not read: {file.relative_to(path).as_posix()}: {why}" for file, why in files.left.items()]
    return [f"read: {taken}", *left]


def resolve_settings(flags: Mapping[str, Any]) -> Settings:
    """The settings as `backprop train` would take them, with these flags.

    Raises:
        CodedError: A setting is wrong.
    """
    return settings.resolve(flags, os.environ, Path(settings.TOML_FILE)).settings
