"""Models and data sets by name: a file or folder on this machine, or a download that the user requested."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from backpropagate.errors import (
    DataMissingError,
    HubAccessError,
    HubUnreachableError,
    ModelInvalidError,
    ModelNotFoundError,
)
from backpropagate.system import is_offline, path_exists, program_home, to_path
from bp_data import DatasetNotFoundError, fetch_dataset, looks_like_hub_name
from bp_data.folders import find_files
from bp_data.hub import network_errors, send_no_usage_reports
from bp_runs.errors import InvalidSettingError, first_line
from bp_runs.files import coded_disk_errors
from bp_runs.spec import DataSpec, Settings
from bp_runs.wording import setting_ref

_log = logging.getLogger("backpropagate")
TOKENIZER: Literal["tokenizer"] = "tokenizer"
WHOLE: Literal["whole"] = "whole"
Need = Literal["whole", "tokenizer"]
"""Whether the weights are needed too."""

# The card names the license, which goes along with what is exported.
_WANTED = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt", "README.md")
_UNWANTED = ("consolidated*", "original/*")  # the same weights a second time


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model on disk."""

    folder: Path
    commit: str | None
    """The Hub commit; None for a folder of the user's."""


def find_model(
    name: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    need: Need = WHOLE,
    with_code: bool = False,
) -> BaseModel:
    """The model's folder; a Hub model is downloaded unless it is in the cache.

    Args:
        name: A folder or Hub id.
        revision: Branch, tag or commit of a Hub model.
        offline: Use the cache only.
        need: Whether weights are needed too.
        with_code: Fetch the model's own Python code as well.

    Raises:
        ModelNotFoundError, ModelInvalidError: No such folder or Hub model, or not a Hugging Face model.
        HubUnreachableError, HubAccessError: The Hub does not answer, or rejects.
        DiskFullError, OutputNotWritableError: The cache cannot hold it.
    """
    folder = to_path(name)
    if path_exists(folder) and folder.is_dir():
        return BaseModel(require_model_folder(folder.resolve(), need), None)
    if path_exists(folder):
        raise ModelInvalidError(f"{name} is a file, not a model folder")
    if _looks_like_path(name):
        raise ModelNotFoundError(f"there is no model folder {name}")
    return _from_hub(name, revision, offline=offline, need=need, with_code=with_code)


def find_tokenizer(settings: Settings) -> Path:
    """The folder of the settings' model, with its tokenizer and config and perhaps without weights.

    Raises:
        CodedError: As `find_model`.
    """
    model, offline = settings.model, is_offline(os.environ)
    return find_model(model.name, revision=model.revision, offline=offline, need=TOKENIZER).folder


def require_model_folder(folder: Path, need: Need = WHOLE) -> Path:
    """Check that ``folder`` has a config, and weights where they are needed.

    Raises:
        ModelInvalidError: It lacks one of them.
    """
    if not (folder / "config.json").is_file():
        raise ModelInvalidError(f"{folder} has no config.json")
    if need == WHOLE and not any(folder.glob("*.safetensors")):
        raise ModelInvalidError(f"{folder} has no *.safetensors weights")
    return folder


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~", "\\")) or name.count("/") != 1 or ":" in name


def measure_download(name: str) -> int:
    """Bytes of a Hub model's files that `find_model` fetches.

    Raises:
        CodedError: As `find_model`.
    """
    from huggingface_hub import HfApi

    send_no_usage_reports()
    with _hub_errors(name, None, offline=False):
        files = HfApi().model_info(name, files_metadata=True).siblings or []
    return sum(file.size or 0 for file in files if _is_wanted(file.rfilename))


def _is_wanted(name: str) -> bool:
    """Whether a file is fetched, by the rules of `huggingface_hub`: ``*`` stands for slashes too."""
    return any(fnmatch(name, p) for p in _WANTED) and not any(fnmatch(name, p) for p in _UNWANTED)


def _from_hub(name: str, revision: str | None, *, offline: bool, need: Need, with_code: bool) -> BaseModel:
    from huggingface_hub import constants, snapshot_download

    send_no_usage_reports()
    patterns = [p for p in _WANTED if need == WHOLE or p != "*.safetensors"] + (["*.py"] if with_code else [])
    with _hub_errors(name, revision, offline=offline), coded_disk_errors(Path(constants.HF_HUB_CACHE)):
        found = snapshot_download(
            name,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=list(_UNWANTED),
            local_files_only=offline,
        )
    return BaseModel(require_model_folder(Path(found), need), Path(found).name)


@contextmanager
def _hub_errors(name: str, revision: str | None, *, offline: bool) -> Iterator[None]:
    """The library's errors about a model as ours."""
    from huggingface_hub import errors as hub

    try:
        yield
    except hub.GatedRepoError as error:
        raise HubAccessError(f"{name} is gated", cause=first_line(error)) from error
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.HFValidationError) as error:
        what = f"{name} at revision {revision}" if revision else name
        raise ModelNotFoundError(f"the Hub has no model {what}", cause=first_line(error)) from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        why = "offline mode is on" if offline else "the Hub does not answer"
        raise HubUnreachableError(f"{name} is not in the local cache, and {why}") from error
    except network_errors() as error:
        raise HubUnreachableError(f"{name} could not be fetched", cause=first_line(error)) from error


@dataclass(frozen=True, slots=True)
class Rows:
    """The data on disk."""

    path: Path
    """A file or folder."""
    commit: str | None
    """The Hub commit of a data set; None for files of the user's."""


def _near_files(path: Path) -> list[Path]:
    """Files of the same folder whose names are close to the one that isn't there."""
    import difflib

    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return []
    return [path.with_name(name) for name in difflib.get_close_matches(path.name, names, n=1, cutoff=0.7)]


def _report_left(path: Path) -> None:
    """Say which files of a folder are read and which are not."""
    if path.is_dir() and (files := find_files(path)).left:
        taken = ", ".join(file.relative_to(path).as_posix() for file in files.taken)
        left = ", ".join(f"{file.relative_to(path).as_posix()} ({why})" for file, why in files.left.items())
        _log.warning("%s: read: %s; not read: %s", path, taken, left)


def find_rows(data: DataSpec, environ: Mapping[str, str], *, offline: bool = False, quiet: bool = False) -> Rows:
    """The data's file or folder; a data set of the Hub is downloaded unless it was before.

    Args:
        data: What is requested.
        environ: The environment, which says where downloads are kept.
        offline: Use what was downloaded before.
        quiet: Don't log which files of a folder are not read.

    Raises:
        DataMissingError: Nothing is requested.
        DatasetNotFoundError: Neither this machine nor the Hub has it.
        InvalidSettingError: A split, subset or revision of a plain file, or a revision of a folder.
        DataError, DatasetUnreachableError, DatasetAccessError: As `bp_data.fetch_dataset`.
    """
    if not data.path:
        raise DataMissingError("no data file was named")
    path = to_path(data.path)
    part = {"data.subset": data.subset, "data.split": data.split, "data.revision": data.revision}
    asked = [key for key, value in part.items() if value is not None]
    if path_exists(path) and not (path.is_dir() and asked):
        if asked:
            raise InvalidSettingError(
                f"{{set:{asked[0]}}} chooses a part of a data set, and {data.path} is a file",
                fix=f"Leave it out: {{set:{asked[0]}}}",
                setting=asked[0],
            )
        if not quiet:
            _report_left(path)
        return Rows(path, None)
    if path_exists(path) and path.is_dir() and data.revision is not None:
        raise InvalidSettingError(
            f"{{set:data.revision}} is for data sets of the Hub, and {data.path} is a folder",
            fix="Leave it out: {set:data.revision}",
            setting="data.revision",
        )
    if not (path_exists(path) and path.is_dir()) and not looks_like_hub_name(data.path):
        near = _near_files(path)
        fix = f"Check the spelling; perhaps it is {setting_ref('data.path', near[0])}" if near else None
        raise DatasetNotFoundError(f"there is no data file {data.path}", fix=fix)
    found = fetch_dataset(
        path if path.is_dir() else data.path,
        program_home(environ) / "datasets",
        subset=data.subset,
        split=data.split,
        revision=data.revision,
        offline=offline,
    )
    return Rows(found.path, found.commit)
