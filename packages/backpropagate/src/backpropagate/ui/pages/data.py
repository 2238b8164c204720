"""Data files: browse what may be read, upload, and open one; `data_check` says what training makes of it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from backpropagate.errors import UiPathError
from backpropagate.settings import TOML_FILE, resolve
from backpropagate.ui.folders import Places
from backpropagate.ui.local_models import find_local_models
from backpropagate.ui.render import show

_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".xlsx", ".parquet", ".txt", ".md")
_PACKED = (".gz", ".zst")
_TEXT = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".md")
_HEAD_BYTES, _HEAD_LINES, _HEAD_WIDTH = 2**16, 6, 600
UPLOADS = "uploads"
_MOST_ENTRIES = 500
_SMALL = 20 * 2**20  # bytes of a file that is checked without being asked


def show_data(request: Request) -> Response:
    """A folder's data files, or one file with what can be looked at."""
    places: Places = request.app.state.site.places
    asked = request.query_params.get("path", "")
    if not asked:
        roots = list(dict.fromkeys((*places.readable, places.own / UPLOADS)))
        roots = [root for root in roots if root.is_dir()]
        return show(request, "data.html", here=None, up=None, folders=roots, files=[], file=None, **_form(request))
    path = places.require_readable(asked)
    if path.is_file():
        head, local = _head(path), find_local_models(places, request.app.state.site.environ)
        return show(
            request, "data.html", here=path.parent, up=None, folders=[], files=[], file=path, head=head, local=local,
            bytes=path.stat().st_size, is_small=path.stat().st_size < _SMALL, **_form(request),
        )  # fmt: skip
    folders, files = _entries(path)
    up = path.parent if _may_read(places, path.parent) else None
    return show(request, "data.html", here=path, up=up, folders=folders, files=files, file=None, **_form(request))


def _form(request: Request) -> dict[str, Any]:
    known = resolve({}, os.environ, Path(TOML_FILE)).settings
    return {
        "model": request.query_params.get("model", ""),
        "max_seq_length": request.query_params.get("max_seq_length", ""),
        "known": known.model,
    }


def find_data_files(places: Places) -> list[str]:
    """Data files of the folders that the page may read, not those below; paths as people give them."""
    found: list[str] = []
    for place in (*places.readable, places.own / UPLOADS):
        with contextlib.suppress(UiPathError):
            found += [str(path) for path, _ in _entries(place)[1]]
    here = str(Path.cwd())
    return [path.removeprefix(f"{here}/") for path in found]


def upload(request: Request, form: FormData) -> Response:
    """Keep an uploaded data file in the page's own folder, under a name of its own.

    Raises:
        UiPathError: It is no data file by its name.
    """
    file = form.get("file")
    if not isinstance(file, UploadFile) or not file.filename:
        raise UiPathError("no file was chosen", fix="Choose a data file, then upload it.")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(file.filename.replace("\\", "/")).name).lstrip(".-")[-100:]
    if not _is_data(name) or not Path(name).stem:
        raise UiPathError(f"{file.filename[:100]!r} is not a data file", fix=f"Upload one of {', '.join(_KINDS)}.")
    folder = request.app.state.site.places.own / UPLOADS
    folder.mkdir(parents=True, exist_ok=True)
    target = free_name(folder, name)
    with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
        shutil.copyfileobj(file.file, out)
    return RedirectResponse(f"/data?{urlencode({'path': target})}", 303)


def free_name(folder: Path, name: str) -> Path:
    """A file of a folder that isn't there yet, by a name or that name with a number before it."""
    target = folder / name
    for number in range(2, 1000):
        if not target.exists():
            break
        target = folder / f"{number}-{name}"
    return target


def _head(path: Path) -> str | None:
    """The file's first lines as they are; None for formats that are no text."""
    if not any(path.name.lower().endswith(kind) for kind in _TEXT):
        return None
    with path.open("rb") as file:
        lines = file.read(_HEAD_BYTES).decode("utf-8", errors="replace").splitlines()
    return "\n".join(line[:_HEAD_WIDTH] + (" …" if len(line) > _HEAD_WIDTH else "") for line in lines[:_HEAD_LINES])


def _may_read(places: Places, path: Path) -> bool:
    try:
        places.require_readable(str(path))
    except UiPathError:
        return False
    return True


def _entries(folder: Path) -> tuple[list[Path], list[tuple[Path, int]]]:
    """Folders and data files, hidden ones left out.

    Raises:
        UiPathError: It cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            found = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name.lower())
            folders = [Path(e.path) for e in found if e.is_dir()]
            files = [(Path(e.path), e.stat().st_size) for e in found if e.is_file() and _is_data(e.name)]
    except OSError as error:
        raise UiPathError(f"{folder} cannot be read", cause=error.strerror) from error
    return folders[:_MOST_ENTRIES], files[:_MOST_ENTRIES]


def _is_data(name: str) -> bool:
    for packed in _PACKED:
        name = name.removesuffix(packed)
    return name.lower().endswith(_KINDS)
