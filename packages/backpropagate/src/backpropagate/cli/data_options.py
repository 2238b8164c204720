"""What `backprop data` and `validate` read: files, folders, data sets of the Hub, and a model's tokenizer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from backpropagate import catalogue, settings, system
from backpropagate.cli.flags import flag_names
from bp_runs.spec import DataSpec, Settings

Model = Annotated[str | None, Parameter(name=flag_names(settings.all_settings()["model.name"]))]


def _named(key: str) -> Parameter:
    setting = settings.all_settings()[key]
    return Parameter(name=flag_names(setting), help=setting.help)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Part:
    """Which part of a data set is meant."""

    subset: Annotated[str | None, _named("data.subset")] = None
    split: Annotated[str | None, _named("data.split")] = None
    data_revision: Annotated[str | None, _named("data.revision")] = None


def find_file(asked: str | DataSpec, part: Part | None = None) -> Path:
    """The local file or folder of what was typed, or of the settings.

    Raises:
        CodedError: As `catalogue.find_rows`.
    """
    if isinstance(asked, str):
        part = part or Part()
        asked = DataSpec(path=asked, subset=part.subset, split=part.split, revision=part.data_revision)
    return catalogue.find_rows(asked, os.environ, offline=system.is_offline(os.environ)).path


def resolve_settings(flags: Mapping[str, Any]) -> Settings:
    """The settings as `backprop train` would take them, with these flags.

    Raises:
        CodedError: A setting is wrong.
    """
    return settings.resolve(flags, os.environ, Path(settings.TOML_FILE)).settings
