"""Data files: browse what may be read, see token by token what is trained, check a file as training does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from backpropagate.errors import UiPathError
from backpropagate.settings import TOML_FILE, resolve
from backpropagate.ui.folders import Places
from backpropagate.ui.pages.training import require_readable_name
from backpropagate.ui.render import show, whole_number
from backpropagate.ui.subcommand import AnswerError, ask
from bp_runs.errors import CodedError

_KINDS = (".jsonl", ".json", ".csv", ".parquet", ".txt", ".md")
_PACKED = (".gz", ".zst")
_MOST_ENTRIES = 500
_PREVIEW_SECONDS, _CHECK_SECONDS = 120, 600
_ROWS = 3
_REJECTED_SHOWN = 50


def show_data(request: Request) -> Response:
    """A folder's data files, or one file with what can be looked at."""
    places: Places = request.app.state.site.places
    asked = request.query_params.get("path", "")
    if not asked:
        roots = list(dict.fromkeys((*places.readable, places.own)))
        return show(request, "data.html", here=None, up=None, folders=roots, files=[], file=None, **_form(request))
    path = places.require_readable(asked)
    if path.is_file():
        return show(request, "data.html", here=path.parent, up=None, folders=[], files=[], file=path, **_form(request))
    folders, files = _entries(path)
    up = path.parent if _may_read(places, path.parent) else None
    return show(request, "data.html", here=path, up=up, folders=folders, files=files, file=None, **_form(request))


def _form(request: Request) -> dict[str, Any]:
    known = resolve({}, os.environ, Path(TOML_FILE)).settings
    skip = request.query_params.get("skip", "")
    return {
        "model": request.query_params.get("model", ""),
        "max_seq_length": request.query_params.get("max_seq_length", ""),
        "known": known.model,
        "skip": whole_number(skip, 0),
    }


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


def show_preview(request: Request) -> Response:
    """Some rows token by token; a part of the file's page."""
    skip = _form(request)["skip"]
    try:
        words = ["data", "preview", *_words(request), f"--rows={_ROWS}", f"--skip={skip}"]
        found = ask(words, seconds=_PREVIEW_SECONDS)
    except (AnswerError, CodedError) as error:
        return _refusal(request, error)
    return show(request, "parts/preview.html", rows=found["rows"], skip=skip, step=_ROWS)


def show_check(request: Request) -> Response:
    """What training would make of the whole file; a part of the file's page."""
    try:
        found = ask(["validate", *_words(request), "--on-bad-row=skip"], seconds=_CHECK_SECONDS)
    except (AnswerError, CodedError) as error:
        return _refusal(request, error)
    return show(request, "parts/checked.html", found=found, rejected=found["rejected"][:_REJECTED_SHOWN])


def _words(request: Request) -> list[str]:
    """The file, model and longest row as words of a command; nothing is fetched for a look.

    Raises:
        UiPathError: File or model lie outside the page's folders.
    """
    places: Places = request.app.state.site.places
    asked = request.query_params.get("path", "")
    if not asked:
        raise UiPathError("no file was named")
    file = places.require_readable(asked)
    words = ["--offline", str(file)]
    if model := request.query_params.get("model", "").strip():
        require_readable_name(places, model)
        words.append(f"--model={model}")
    if longest := request.query_params.get("max_seq_length", "").strip():
        words.append(f"--max-seq-length={longest}")
    return words


def _refusal(request: Request, error: AnswerError | CodedError) -> Response:
    told = error.told if isinstance(error, AnswerError) else error.to_dict()
    return show(request, "parts/refusal.html", message=error.message, told=told)
