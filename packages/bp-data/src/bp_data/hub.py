"""Data sets of the Hugging Face Hub by name, and the splits and subsets of a folder laid out like one.

Which files make up a subset and a split is found by the `datasets` library, as everywhere else; the files are then
fetched at one commit and read by this package's own readers, so that rows keep their fields, files and numbers. A
library that reads them into Arrow tables would fill in fields that a row does not have.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import shutil
import socket
import ssl
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from glob import escape
from pathlib import Path
from typing import Final

import orjson

from bp_data.errors import (
    DatasetAccessError,
    DatasetEmptyError,
    DatasetFormatUnsupportedError,
    DatasetNotFoundError,
    DatasetPartUnknownError,
    DatasetUnreachableError,
)
from bp_data.files import kind_of
from bp_data.folders import LIST_FILE, saved_splits
from bp_runs.errors import OutputLockedError, first_line
from bp_runs.files import coded_disk_errors, publish_folder, publish_json
from bp_runs.process import acquire_lock
from bp_runs.wording import setting_ref

_log = logging.getLogger("bp_data")
_NAME: Final = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# Endings of files that are no data sets; a name on the Hub may have dots, as in owner/name-2.1.
_FILE: Final = re.compile(
    r"\.(?:zip|tar|tgz|bz2|xz|7z|rar|pdf|docx?|odt|rtf|html?|xml|ya?ml|toml|log|pkl|pickle|h5|npy|npz|db|sqlite|py|ipynb)$",
    re.IGNORECASE,
)
_MISSING: Final = "Install it: {install:bp-data[hub]}"
# A split that is not named is the first of these that there is.
_USUAL_SPLITS: Final = ("train", "train_sft", "training")
# Of one split: the commits used last stay, and those that somebody may still be reading.
_KEPT_COMMITS: Final = 2
_FRESH_SECONDS: Final = 24 * 3600


@dataclass(frozen=True, slots=True)
class HubData:
    """A split of a data set, on this machine.

    Attributes:
        path: The file, or a folder that holds the split's files and nothing else.
        name: The data set as it was given.
        subset: Its configuration.
        split: Its split.
        commit: The Hub's commit, 40 hex digits; None for a folder of the user's.
    """

    path: Path
    name: str
    subset: str
    split: str
    commit: str | None


def looks_like_hub_name(text: str) -> bool:
    """Whether a text may be the name of a data set on the Hub: ``owner/name``, or an old one's bare ``name``."""
    if not _NAME.fullmatch(text) or ".." in text or _FILE.search(text):
        return False
    try:
        kind_of(Path(text))
    except DatasetFormatUnsupportedError:
        return True
    return False


def fetch_dataset(
    name: str | Path,
    folder: Path,
    *,
    subset: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    offline: bool = False,
) -> HubData:
    """A split's files, fetched unless they are there already; a download that stops half-way leaves nothing.

    Args:
        name: ``owner/name`` on the Hub, or a folder on this machine.
        folder: Where files are kept for the next time.
        subset: The configuration; None: the only one, or the data set's own default.
        split: The split; None: ``train``, or the only one.
        revision: Branch, tag or commit; None: the newest. What it stood for is in ``commit``.
        offline: Use what was fetched before, and no network.

    Raises:
        DatasetNotFoundError: Neither the Hub nor this machine has it, or not at this revision.
        DatasetPartUnknownError: No such subset or split, or several and none is named; they are listed.
        DatasetUnreachableError: The Hub does not answer, and nothing was fetched before.
        DatasetAccessError: The Hub wants a login, or accepted terms.
        DatasetFormatUnsupportedError: It is made by a script, or its files are of a kind that is not understood; or
            the `datasets` library is not installed.
        DiskFullError, OutputNotWritableError: ``folder`` cannot hold the files.
    """
    local = Path(name)
    if local.is_dir():
        with _coded(str(name)):
            return _from_folder(local.resolve(), folder, subset, split)
    text = str(name)
    note = folder / "names" / f"{_key(text, subset, split, revision)}.json"
    known = _recall(note)
    if offline:
        if known is None:
            raise DatasetUnreachableError(
                f"there is no file {text}, nor a data set {text} fetched before; offline is on"
            )
        return known
    if known is not None and known.commit == revision:
        return known  # a commit never changes
    try:
        with _coded(text, revision):
            found = _from_hub(text, folder, subset, split, revision)
    except DatasetUnreachableError as error:
        if known is None:
            raise
        _log.warning("%s; what was fetched before is used, commit %s", error.message, known.commit)
        return known
    note.parent.mkdir(parents=True, exist_ok=True)
    publish_json(note, {**asdict(found), "path": str(found.path)})
    return found


def _from_folder(local: Path, folder: Path, subset: str | None, split: str | None) -> HubData:
    if saved := saved_splits(local):
        split = _choose(str(local), "split", split, saved, _USUAL_SPLITS)
        return HubData(local / split, str(local), subset or "default", split, None)
    chosen, files, split = _find_files(str(local), None, subset, split)
    paths = [Path(file) for file in files]
    path = paths[0] if len(paths) == 1 else _link_all(local, paths, folder / "folders", _key(str(local), chosen, split))
    return HubData(path, str(local), chosen, split, None)


def _link_all(local: Path, files: Sequence[Path], parent: Path, name: str) -> Path:
    """A folder with these files alone, as they are now: hard links where the disk allows, else copies.

    Another process may be reading it, so it is only made again if a file changed.
    """
    stats = [file.stat() for file in files]
    state = _key("", *(f"{f} {s.st_size} {s.st_mtime_ns}" for f, s in zip(files, stats, strict=True)))
    target = parent / f"{name}{state}"
    with _one_at_a_time(parent.parent, name):
        if not target.is_dir():
            with publish_folder(target) as partial:
                for file in files:
                    place = partial / file.relative_to(local)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    _link(file, place)
                _write_list(partial, [file.relative_to(local).as_posix() for file in files])
            for old in parent.glob(f"{escape(name)}-*"):
                if old != target:
                    shutil.rmtree(old, ignore_errors=True)
    return target


def send_no_usage_reports() -> None:
    """Switch off huggingface_hub's usage reports, of which its variable is read at import only."""
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_TELEMETRY = True


def _link(file: Path, place: Path) -> None:
    try:
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)


def _from_hub(name: str, folder: Path, subset: str | None, split: str | None, revision: str | None) -> HubData:
    from huggingface_hub import HfApi, snapshot_download

    send_no_usage_reports()
    commit = HfApi().dataset_info(name, revision=revision).sha or ""
    subset, files, split = _find_files(name, commit, subset, split)
    wanted = [file.split(f"@{commit}/", 1)[-1] for file in files]
    parent, key = folder / "hub", _key(name, subset, split)
    target = parent / f"{key}-{commit}"
    with _one_at_a_time(folder, key):
        if not target.is_dir():
            with publish_folder(target) as partial:
                snapshot_download(
                    name, repo_type="dataset", revision=commit, allow_patterns=[*map(escape, wanted)], local_dir=partial
                )
                shutil.rmtree(partial / ".cache", ignore_errors=True)
                _write_list(partial, wanted)
        _prune(target, parent.glob(f"{escape(key)}-*"))
    path = target / wanted[0] if len(wanted) == 1 else target
    return HubData(path, name, subset, split, commit)


def _write_list(folder: Path, names: Sequence[str]) -> None:
    """Note a split's files, so that none is taken for something else by its name."""
    (folder / LIST_FILE).write_bytes(orjson.dumps({"files": list(names)}))


@contextlib.contextmanager
def _one_at_a_time(folder: Path, key: str) -> Iterator[None]:
    """A lock: whoever comes second waits, and then finds what the first one fetched."""
    file = folder / "locks" / f"{key}.lock"
    with coded_disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = acquire_lock(file, 0)
    except OutputLockedError:
        _log.warning("another process fetches %s; waiting for it", key.rpartition("-")[0])
        lock = acquire_lock(file, -1)
    try:
        yield
    finally:
        lock.release()


def _prune(used: Path, commits: Iterable[Path]) -> None:
    """Note that a commit was used, and remove old ones of the same split."""
    os.utime(used)
    by_age = sorted(commits, key=lambda commit: commit.stat().st_mtime, reverse=True)
    for old in by_age[_KEPT_COMMITS:]:
        if old.stat().st_mtime < time.time() - _FRESH_SECONDS:
            size = sum(file.stat().st_size for file in old.rglob("*") if file.is_file())
            _log.info("removing %s, %.1f MiB: newer commits are here", old, size / 2**20)
            shutil.rmtree(old, ignore_errors=True)


def _find_files(name: str, commit: str | None, subset: str | None, split: str | None) -> tuple[str, list[str], str]:
    """The subset's and split's names, and the split's files as `datasets` finds them."""
    from datasets import config, get_dataset_config_names, get_dataset_default_config_name, load_dataset_builder

    config.HF_UPDATE_DOWNLOAD_COUNTS = False  # each look at a data set's splits would be counted as a download

    subsets = get_dataset_config_names(name, revision=commit)
    usual = None if subset else get_dataset_default_config_name(name, revision=commit)
    chosen = _choose(name, "subset", subset, subsets, (usual or "default",))
    by_split: Mapping[str, Sequence[str]] = load_dataset_builder(name, chosen, revision=commit).config.data_files or {}
    found = {str(key): [str(file) for file in files] for key, files in by_split.items()}
    if not found:
        raise DatasetFormatUnsupportedError(f"{name} has no data files that are found by name")
    wanted = _choose(name, "split", split, list(found), _USUAL_SPLITS)
    for file in found[wanted]:
        kind_of(Path(file))
    return chosen, found[wanted], wanted


def _choose(name: str, what: str, wanted: str | None, known: Sequence[str], usual: Sequence[str]) -> str:
    if wanted is not None and wanted in known:
        return wanted
    if wanted is None and (found := next((one for one in usual if one in known), None)):
        return found
    if wanted is None and len(known) == 1:
        return known[0]
    asked = f"no {what} {wanted!r}" if wanted is not None else f"several {what}s, and none is named"
    listed = ", ".join(known)
    raise DatasetPartUnknownError(
        f"{name} has {asked}; there {'is' if len(known) == 1 else 'are'}: {listed}",
        fix=f"Name one of them: {setting_ref(f'data.{what}', known[0])}",
        setting=f"data.{what}",
        details={f"{what}s": list(known)},
    )


def _recall(note: Path) -> HubData | None:
    """What an earlier call fetched for the same words; None where it fetched nothing, or that is gone."""
    try:
        found = orjson.loads(note.read_bytes())
        data = HubData(**{**found, "path": Path(found["path"])})
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError):
        return None
    return data if data.path.exists() else None


def _key(*parts: str | None) -> str:
    shown = re.sub(r"[^\w.-]+", "--", Path(parts[0] or "").name)[:40]
    whole = hashlib.sha256("\0".join(part or "" for part in parts).encode()).hexdigest()
    return f"{shown}-{whole[:16]}"


def network_errors() -> tuple[type[Exception], ...]:
    """What the Hub's client raises where the network fails, whichever HTTP library it was built on; no disk's error."""
    from huggingface_hub.errors import HfHubHTTPError

    library = next(base for base in HfHubHTTPError.__bases__ if base is not OSError and issubclass(base, Exception))
    return (HfHubHTTPError, library, ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)


@contextlib.contextmanager
def _coded(name: str, revision: str | None = None) -> Iterator[None]:
    """The libraries' errors as ours."""
    try:
        from datasets.data_files import EmptyDatasetError
        from datasets.exceptions import DataFilesNotFoundError
        from datasets.exceptions import DatasetNotFoundError as UnknownDatasetError
        from huggingface_hub import errors as hub
    except ImportError as error:
        raise DatasetFormatUnsupportedError("data sets by name need the datasets library", fix=_MISSING) from error
    unreachable: tuple[type[Exception], ...] = (hub.LocalEntryNotFoundError, *network_errors())
    what = f"{name} at revision {revision}" if revision else name
    try:
        yield
    except hub.GatedRepoError as error:
        raise DatasetAccessError(f"the data set {name} is gated", cause=first_line(error)) from error
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.HFValidationError) as error:
        raise DatasetNotFoundError(
            f"there is no file {name}, and the Hub has no data set {what}",
            cause=first_line(error),
            fix="Check the spelling; a private data set wants a login: hf auth login",
        ) from error
    except (EmptyDatasetError, DataFilesNotFoundError) as error:
        raise DatasetEmptyError(f"the data set {name} has no data files", cause=first_line(error)) from error
    except UnknownDatasetError as error:
        raise DatasetNotFoundError(f"there is no data set {what}", cause=first_line(error)) from error
    except unreachable as error:
        raise DatasetUnreachableError(
            f"there is no file {name}, and the data set {name} could not be fetched", cause=first_line(error)
        ) from error
    except (RuntimeError, ValueError) as error:
        raise DatasetFormatUnsupportedError(
            f"the data set {name} cannot be read by its files",
            cause=first_line(error),
            fix="Use the Hub's converted copy, if a script makes the data: {set:data.revision=refs/convert/parquet}",
        ) from error
