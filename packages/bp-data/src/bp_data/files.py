"""Data files on disk: which kinds there are, which of a folder belong together, and their bytes as UTF-8."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import hashlib
import io
import os
import re
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, TypeAlias, cast

import orjson

from bp_data.errors import (
    DatasetFormatUnsupportedError,
    DatasetNotFoundError,
    DatasetParseFailedError,
    DatasetPartUnknownError,
    DatasetUnreadableError,
)
from bp_data.json_rows import find_layout
from bp_runs.wording import setting_ref

Kind: TypeAlias = Literal[
    ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".xlsx", ".xls", ".ods", ".parquet", ".arrow", ".txt", ".md"
]

KINDS: Final[tuple[Kind, ...]] = (
    *(".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".xlsx", ".xls", ".ods", ".parquet", ".arrow", ".txt", ".md"),
)
PACKED: Final = (".gz", ".zst")
UNDERSTOOD: Final = (*KINDS, *PACKED)
"""Endings of the files that are understood; the last two stand after one of the others: ``.jsonl.gz``."""

_DOCUMENTS: Final = (".txt", ".md")
_BINARY: Final = (".parquet", ".arrow", ".xlsx", ".xls", ".ods")
_HEAD = 65_536  # bytes looked at before the first row
_BLOCK = 1 << 20
_LONGEST = 64 * 2**20
_MAGICS = {
    b"\x1f\x8b": "gzip data",
    b"\x28\xb5\x2f\xfd": "Zstandard data",
    b"PK\x03\x04": "a zip archive or a workbook",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook",
    b"%PDF": "a PDF file",
    b"SQLite format 3": "an SQLite database",
}
_WIDE_MARKS = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}


def kind_of(path: Path) -> Kind:
    """The kind of a file by its name, whatever it is packed with.

    Raises:
        DatasetFormatUnsupportedError: A name that ends in none of `UNDERSTOOD`.
    """
    name = path.name.lower()
    for ending in PACKED:
        name = name.removesuffix(ending)
    for kind in KINDS:
        if name.endswith(kind) and name != kind:
            return kind
    raise DatasetFormatUnsupportedError(f"{path.name}: understood are {', '.join(KINDS)}, also with .gz or .zst")


# --- The files of a folder -----------------------------------------------------------------------------------------

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


# --- The bytes of a file -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def coded_read_errors(path: Path) -> Iterator[None]:
    """Turn the system's errors while reading ``path``, and damaged compression, into coded ones."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        what = "its compressed data is cut short or damaged"
        raise DatasetParseFailedError(
            f"{path}: {what}", cause=str(error), fix="Download or pack the file again; it is not whole."
        ) from error
    except OSError as error:
        raise DatasetUnreadableError(f"cannot read {path}", cause=str(error)) from error
    except UnicodeError as error:
        raise DatasetParseFailedError(f"{path}: its text is damaged", cause=str(error)) from error
    except ValueError as error:
        if "null" not in str(error):
            raise
        raise DatasetUnreadableError(f"cannot read {str(path)!r}", cause=str(error)) from error


@contextlib.contextmanager
def open_data(path: Path, encoding: str | None = None) -> Iterator[io.BufferedReader]:
    """The file's bytes, unpacked and as UTF-8; memory stays flat.

    Args:
        path: A file of a known kind.
        encoding: Of lines that are not UTF-8; None leaves such bytes as they are. UTF-16 and UTF-32 are found by
            themselves.

    Raises:
        DatasetParseFailedError: Binary data under the name of a text, or not what its ending says.
    """
    with path.open("rb") as raw:
        stream = _unpack(path, raw)
        unpacked = stream
        try:
            if kind_of(path) not in _BINARY:
                head = stream.peek(_HEAD)[:_HEAD]
                wide = _find_wide(head)
                if wide is not None:
                    stream = io.BufferedReader(_Recoded(stream, wide), _BLOCK)
                else:
                    _reject_binary(path, head)
                    stream = stream if encoding is None else io.BufferedReader(_LinesRecoded(stream, encoding), _BLOCK)
            yield stream
        finally:
            if unpacked is not raw:
                unpacked.close()


def find_encoding(path: Path) -> str:
    """``utf-8``, ``utf-16`` or ``utf-32`` by a file's first bytes; they don't tell other encodings from UTF-8."""
    with coded_read_errors(path), path.open("rb") as raw, _unpack(path, raw) as stream:
        return _find_wide(stream.peek(_HEAD)[:_HEAD]) or "utf-8"


def _find_wide(head: bytes) -> str | None:
    """UTF-16 or UTF-32 by its mark, or by the zero bytes that letters of Latin alphabets have at every other place."""
    found = next((name for mark, name in _WIDE_MARKS.items() if head.startswith(mark)), None)
    if found is not None or b"\x00" not in head or len(head) < 8 or _find_magic(head):
        return found
    even, odd = head[0::2], head[1::2]
    zeros = (even.count(0) / max(len(even), 1), odd.count(0) / max(len(odd), 1))
    if min(zeros) > 0.02 or max(zeros) < 0.4:
        return None
    return "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"


def _unpack(path: Path, raw: BinaryIO) -> io.BufferedReader:
    ending = path.suffix.lower()
    if ending == ".gz":
        _require_magic(path, raw, b"\x1f\x8b", "gzip")
        return io.BufferedReader(cast("io.RawIOBase", gzip.GzipFile(fileobj=raw)), _BLOCK)
    if ending == ".zst":
        _require_magic(path, raw, b"\x28\xb5\x2f\xfd", "Zstandard")
        return io.BufferedReader(_ZstdFile(raw), _BLOCK)
    return io.BufferedReader(cast("io.RawIOBase", raw), _BLOCK)


def _require_magic(path: Path, raw: BinaryIO, magic: bytes, name: str) -> None:
    head = raw.read(len(magic))
    raw.seek(0)
    if head and head != magic:
        raise DatasetParseFailedError(f"{path} is not {name} data", fix=f"Pack it again, or drop {path.suffix}.")


def _find_magic(head: bytes) -> str | None:
    return next((what for magic, what in _MAGICS.items() if head.startswith(magic)), None)


def _reject_binary(path: Path, head: bytes) -> None:
    found = _find_magic(head)
    if found is None and b"\x00" in head:
        found = f"binary data (a zero byte at offset {head.index(0)})"
    if found is not None:
        raise DatasetParseFailedError(
            f"{path} is {found}, not text", fix="Rename the file to the ending that it should have, or save it as text."
        )


def load_zstd() -> Any:
    """Python's own Zstandard module, which versions before 3.14 have as the package backports.zstd."""
    return import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")


class _Filter(io.RawIOBase):
    """Bytes made from other bytes, block by block; `_next` gives a block, and an empty one at the end."""

    _ready = b""

    def _next(self) -> bytes:
        raise NotImplementedError

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self._ready = self._ready or self._next()
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


class _Recoded(_Filter):
    """Text of an encoding that is known, as UTF-8."""

    def __init__(self, stream: BinaryIO, encoding: str) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)()

    def _next(self) -> bytes:
        while data := self._stream.read(_HEAD):
            if text := self._decoder.decode(data):
                return text.encode()
        return self._decoder.decode(b"", final=True).encode()


class _LinesRecoded(_Filter):
    """Text as UTF-8, of which each line may be in another encoding; lines that are neither stay as they are."""

    def __init__(self, stream: BinaryIO, encoding: str) -> None:
        self._stream, self._encoding = stream, encoding

    def _next(self) -> bytes:
        line = self._stream.readline(_LONGEST)  # never cut inside a letter
        try:
            line.decode()
        except UnicodeDecodeError:
            with contextlib.suppress(UnicodeDecodeError):
                return line.decode(self._encoding).encode()
        return line


class _ZstdFile(_Filter):
    """Zstandard frames, unpacked block by block; data that ends inside a frame is an error and no end of file."""

    def __init__(self, raw: BinaryIO) -> None:
        zstd = load_zstd()
        self._raw = raw
        self._error = zstd.ZstdError
        self._new = zstd.ZstdDecompressor
        self._frame = self._new()
        self._begun = False

    def _next(self) -> bytes:
        while True:
            if self._frame.eof:
                fed = self._frame.unused_data or self._raw.read(_HEAD)
                self._frame, self._begun = self._new(), False
            else:
                fed = self._raw.read(_HEAD)
            if not fed:
                if self._begun:
                    raise EOFError("the data ends inside a Zstandard frame")
                return b""
            self._begun = True
            try:
                if ready := self._frame.decompress(fed):
                    return cast("bytes", ready)
            except self._error as error:
                raise EOFError(str(error)) from error


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
