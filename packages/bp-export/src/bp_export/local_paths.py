"""Folders of a machine in what goes to others: a base is known by its Hub id or its last part, a home not at all.

Nothing here asks the machine: what was made elsewhere is cleaned too.
"""

from __future__ import annotations

import os
import re
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, TypeAlias

StrPath: TypeAlias = str | os.PathLike[str]
"""A path as every public call takes it."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# huggingface_hub keeps owner/name as …/models--owner--name/snapshots/<commit>.
_CACHED = re.compile(r".*[/\\]models--([^/\\]+)[/\\]snapshots[/\\][^/\\]+[/\\]?")
_HOME = re.compile(r"(?:/var)?/home/[^/\s\"']+|/Users/[^/\s\"']+|/root(?=/)|[A-Za-z]:[/\\]+Users[/\\]+[^/\\\n\"']+")
_LEAST_PARTS = 3  # of a path that is distinguished from a word with a slash before it


def has_hub_form(name: str) -> bool:
    """Whether a name has the form ``owner/name``, which a folder may have too."""
    return _HUB_ID.fullmatch(name) is not None


def tell_model(name: str) -> str:
    """A model's name without a machine's folders: its Hub id, also where a cache keeps it, or a path's last part."""
    if cached := _CACHED.fullmatch(name):
        return cached[1].replace("--", "/", 1)
    parts = [part for part in re.split(r"[/\\]", hide_homes(name)) if part]
    return name if has_hub_form(name) else parts[-1] if parts else ""


def hide_homes(text: str) -> str:
    """The text with ``~`` for each home folder in it."""
    return _HOME.sub("~", text)


def hide_places(data: Any) -> Any:
    """JSON's values without folders: of a text that is a whole path only the name is left, and homes are hidden."""
    if isinstance(data, dict):
        return {key: hide_places(value) for key, value in data.items()}
    if isinstance(data, list):
        return [hide_places(value) for value in data]
    return (tell_model(data) if is_place(data) else hide_homes(data)) if isinstance(data, str) else data


def is_place(text: str) -> bool:
    """Whether a text is the absolute path of something in a folder, on any system."""
    if "\n" in text:
        return False
    paths = (PurePosixPath(text.removeprefix("file://")), PureWindowsPath(text))
    return any(path.is_absolute() and len(path.parts) >= _LEAST_PARTS for path in paths)
