"""Which files of a folder are data and belong together, and which are left aside, with the reason."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import orjson

from bp_data.errors import DatasetFormatUnsupportedError, DatasetNotFoundError, DatasetPartUnknownError
from bp_data.files import KINDS, coded_read_errors, kind_of, open_data
from bp_data.json_rows import find_layout
from bp_runs.wording import setting_ref

_DOCUMENTS: Final = (".txt", ".md")

# A file for a test or for validation, by a word of its name or of its folder's, as the `datasets` library finds them.
_HELD_OUT = re.compile(
    r"(?:^|[-._ /0-9])(?:test|testing|eval|evaluation|validation|valid|val|dev|heldout|held[-_]out)(?:[-._ /0-9]|$)"
)
# What describes data or code next to the data.
_DESCRIBES = re.compile(
    r"readme.*|licen[cs]e.*|notice.*|changelog.*|contributing.*|citation.*|requirements.*\.txt|dataset_infos?\.json|"
    r"dataset_dict\.json|state\.json|package(-lock)?\.json|.*config\.json|tokenizer.*\.json|special_tokens_map\.json|"
    r"vocab\.(json|txt)|merges\.txt|.*\.rejected\.jsonl|rejected\.jsonl"
)


@dataclass(frozen=True, slots=True)
class DataFiles:
    """The files that a path stands for.

    Attributes:
        taken: In the order of their names; at least one.
        left: Files of the folder that are not read, with the reason.
    """

    taken: tuple[Path, ...]
    left: Mapping[Path, str] = field(default_factory=dict)


LIST_FILE: Final = ".files.json"
"""In a folder that was made for one split of a data set: the names of its files, of which all are read."""


def list_files(path: Path) -> list[Path]:
    """The data files that a path stands for; see `find_files`."""
    return list(find_files(path).taken)


def find_files(path: Path) -> DataFiles:
    """The file itself, or the files of a folder that belong together.

    Of a folder, and of the folders below it, rows are read and documents (.txt, .md) only where there are no rows. Left
    aside are hidden files, links to files that are there already, files that describe (README, requirements.txt,
    settings in JSON), a second copy of the same name in another form, and files for tests and validation where there
    are others. A folder that `datasets.Dataset.save_to_disk` wrote is read by its own list.

    Raises:
        DatasetNotFoundError: Nothing has this path.
        DatasetFormatUnsupportedError: An unknown kind of file, or a folder without any known one.
        DatasetPartUnknownError: A folder of saved splits, none of which is ``train``.
    """
    with coded_read_errors(path):
        if not path.is_dir():
            if not path.exists():
                raise DatasetNotFoundError(f"there is no file {path}")
            kind_of(path)
            return DataFiles((path,))
        if (saved := _find_listed(path) or _find_saved(path)) is not None:
            return saved
        left: dict[Path, str] = {}
        found = _drop_copies(_drop_described(_walk(path, left), left), left)
        taken = _drop_held_out(path, _drop_documents(found, left), left)
    if not taken:
        raise DatasetFormatUnsupportedError(
            f"the folder {path} holds no data file ({', '.join(KINDS)})",
            cause=", ".join(f"{file.name}: {why}" for file, why in list(left.items())[:8]) or None,
        )
    return DataFiles(tuple(taken), left)


def _walk(path: Path, left: dict[Path, str]) -> list[Path]:
    """All files of known kinds; a link is followed only to a file that is not found otherwise."""
    found: list[Path] = []
    links: list[Path] = []
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "_")))
        left |= {Path(folder, name): "a link to a folder" for name in folders if Path(folder, name).is_symlink()}
        for name in sorted(names):
            file = Path(folder, name)
            if name.startswith((".", "_")):
                continue
            if file.is_symlink():
                links.append(file)
            elif _is_known(file) and file.is_file():
                found.append(file)
            elif not _is_known(file):
                left[file] = "not a data file"
    places = {file.resolve(): file for file in found}
    for link in links:
        target = link.resolve()
        if target in places:
            left[link] = f"a link to {places[target].name}"
        elif target.is_file() and _is_known(link):
            places[target] = link
            found.append(link)
    return sorted(found)


def _is_known(path: Path) -> bool:
    try:
        kind_of(path)
    except DatasetFormatUnsupportedError:
        return False
    return True


def _drop_described(files: Sequence[Path], left: dict[Path, str]) -> list[Path]:
    rows = [file for file in files if not _DESCRIBES.fullmatch(file.name.lower())]
    left |= dict.fromkeys(
        (file for file in files if file not in rows), "describes the data, or lists what was left out"
    )
    others = [file for file in rows if kind_of(file) != ".json"]
    if others:  # a lone .json file is data, one next to data may be settings
        settings = [file for file in rows if kind_of(file) == ".json" and _is_one_object(file)]
        left |= dict.fromkeys(settings, "one JSON object, like a file of settings")
        rows = [file for file in rows if file not in settings]
    return rows


def _is_one_object(file: Path) -> bool:
    with open_data(file) as stream:
        layout, lines = find_layout(stream)
    return layout == "whole" and lines[0][1].lstrip(b"\xef\xbb\xbf \t").startswith(b"{")


def _drop_copies(files: Sequence[Path], left: dict[Path, str]) -> list[Path]:
    """One file of each name: data.csv next to data.jsonl, or data.jsonl.gz, is the same data again."""
    kept: dict[Path, Path] = {}
    order = {kind: place for place, kind in enumerate(KINDS)}
    for file in sorted(files, key=lambda file: (order[kind_of(file)], len(file.suffixes), file)):
        stem = file.with_name(file.name[: file.name.lower().index(kind_of(file))])
        if stem in kept:
            left[file] = f"has the name of {kept[stem].name}, in another form"
        else:
            kept[stem] = file
    return sorted(kept.values())


def _drop_documents(files: Sequence[Path], left: dict[Path, str]) -> list[Path]:
    rows = [file for file in files if kind_of(file) not in _DOCUMENTS]
    if rows:
        left |= dict.fromkeys((file for file in files if file not in rows), "a document among files of rows")
    return rows or list(files)


def _drop_held_out(path: Path, files: Sequence[Path], left: dict[Path, str]) -> list[Path]:
    rest = [file for file in files if not _HELD_OUT.search(file.relative_to(path).as_posix().lower())]
    if rest:
        left |= dict.fromkeys((file for file in files if file not in rest), "for tests or validation, by its name")
    return rest or list(files)


def _find_listed(path: Path) -> DataFiles | None:
    names = _read_names(path / LIST_FILE, "files")
    return DataFiles(tuple(path / name for name in names)) if names else None


def saved_splits(path: Path) -> list[str]:
    """The splits of a folder that `datasets.DatasetDict.save_to_disk` wrote; empty for any other folder."""
    return _read_names(path / "dataset_dict.json", "splits")


def _find_saved(path: Path) -> DataFiles | None:
    """The Arrow files of a folder that the `datasets` library saved; None for any other folder."""
    splits = saved_splits(path)
    if splits:
        split = "train" if "train" in splits else splits[0]
        if split != "train" and len(splits) > 1:
            raise DatasetPartUnknownError(
                f"{path} has several splits, and none is named; there are: {', '.join(splits)}",
                fix=f"Name one of them: {setting_ref('data.split', splits[0])}",
                setting="data.split",
                details={"splits": splits},
            )
        saved = _find_saved(path / split)
        others = {path / name: "another split" for name in splits if name != split}
        return None if saved is None else DataFiles(saved.taken, {**saved.left, **others})
    files = _read_names(path / "state.json", "_data_files")
    if not files:
        return None
    taken = tuple(path / name for name in files)
    left = {file: "not in the saved data set" for file in sorted(path.glob("*.arrow")) if file not in taken}
    return DataFiles(taken, left)


def _read_names(file: Path, key: str) -> list[str]:
    try:
        names = orjson.loads(file.read_bytes())[key]
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError):
        return []
    found = [name.get("filename") if isinstance(name, dict) else name for name in names]
    return [name for name in found if isinstance(name, str) and ".." not in Path(name).parts]


def sha256_data(path: Path) -> str:
    """Hex SHA-256 of a file's bytes as they are on the disk; of a folder, of its files' names and hashes."""
    files = list_files(path)
    with coded_read_errors(path):
        if files == [path]:
            return _sha256(path)
        whole = hashlib.sha256()
        for file in files:
            whole.update(f"{file.relative_to(path).as_posix()}\0{_sha256(file)}\n".encode())
    return whole.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
