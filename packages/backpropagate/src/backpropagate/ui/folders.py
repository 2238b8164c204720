"""Where the web page may look and where it may write."""

from __future__ import annotations

import os
import re
import stat
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from backpropagate.errors import UiFolderError, UiPathError
from backpropagate.presets import find_preset
from backpropagate.system import path_exists, program_home, to_path
from backpropagate.ui_spec import UiSpec
from bp_data import looks_like_hub_name
from bp_runs.paths import runs_folder
from bp_runs.store import RunStore

OWN_NAME = "ui-outputs"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_KEY_DIGITS = 8

# Names of folders that hold keys and passwords, wherever they lie.
_CREDENTIALS = frozenset(
    {".ssh", ".gnupg", ".gpg", ".aws", ".azure", ".kube", ".docker", ".password-store", ".mozilla", ".netrc", ".pki"}
    | {"gcloud", "keyrings", "keychains", ".git"}
)
_SYSTEM = (
    "/bin",
    "/boot",
    "/dev",
    "/etc",
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
    "/proc",
    "/run",
    "/sbin",
    "/sys",
    "/usr",
    "/var",
    "/System",
    "/Library",
    "/Applications",
    "/private/etc",
    "/private/var",
)
_SYSTEM_VARIABLES = ("SYSTEMROOT", "PROGRAMFILES", "PROGRAMFILES(X86)", "PROGRAMDATA")


@dataclass(frozen=True, slots=True)
class Output:
    """An output folder whose runs are shown."""

    key: str
    """Stands for the folder in addresses; made from its path."""
    path: Path
    is_own: bool
    """Whether it lies where the page writes."""

    @property
    def store(self) -> RunStore:
        """Its runs."""
        return RunStore(self.path)

    @property
    def name(self) -> str:
        """What people read: the path from here, or its last part where the page made it."""
        if self.is_own:
            return self.path.name
        here = Path.cwd()
        return f"./{self.path.relative_to(here)}" if self.path.is_relative_to(here) else str(self.path)


@dataclass(frozen=True, slots=True)
class Places:
    """The folders of one page; all of them resolved."""

    own: Path
    """Where the page writes, and nowhere else."""
    shown: tuple[Path, ...]
    """Output folders of others."""
    readable: tuple[Path, ...]
    """Data files and models are read from here."""
    models: Path | None = None
    """Where the program keeps models that it unpacked; they may be read, wherever the page was started."""

    def outputs(self) -> list[Output]:
        """Every output folder that is shown: those named, and the page's own that have runs."""
        made = sorted(folder for folder in own_folders(self.own) if runs_folder(folder).is_dir())
        return [_output(path, is_own=False) for path in self.shown] + [_output(path, is_own=True) for path in made]

    def find(self, key: str) -> Output:
        """The output folder of an address.

        Raises:
            UiPathError: None that is shown.
        """
        for output in self.outputs():
            if output.key == key:
                return output
        raise UiPathError(f"no output folder that is shown has the key {key!r}")

    def require_readable(self, text: str) -> Path:
        """The path of a data file or model that may be read, links resolved.

        Raises:
            UiPathError: It lies elsewhere.
        """
        path = _resolve(to_path(text))
        allowed = [folder for folder in (*self.readable, self.own, *self.shown) if path.is_relative_to(folder)]
        if not allowed:
            raise UiPathError(f"{text} is not in a folder that this page may read")
        # Hidden folders hold keys, settings and the page's own files, never data. Behind a link from a visible name may
        # be a hidden place all the same: git-annex keeps data in .git.
        asked = Path(os.path.abspath(to_path(text)))  # noqa: PTH100  # links are not followed here
        named = {part for folder in allowed if asked.is_relative_to(folder) for part in asked.relative_to(folder).parts}
        below = {part.lower() for folder in allowed for part in path.relative_to(folder).parts}
        if below & (_CREDENTIALS - {".git"}) or path.name.startswith(".") or any(n.startswith(".") for n in named):
            raise UiPathError(f"{text} is hidden, or in a folder for credentials")
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            return path  # whoever opens it says so
        except OSError as error:
            raise UiPathError(f"{text[:100]} can't be read", cause=error.strerror) from error
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a pipe or device would never end
            raise UiPathError(f"{text} is neither a file nor a folder")
        return path

    def new_output(self, name: str) -> Path:
        """The output folder of the page's own with a name; it need not be there yet.

        Raises:
            UiPathError: The name is not one of letters, digits, ``-`` and ``_``.
        """
        if not _NAME.fullmatch(name):
            raise UiPathError(
                f"{name!r} cannot name a folder", fix="Take up to 64 letters, digits, hyphens and underscores."
            )
        path = self.own / name
        if path.is_symlink() or _resolve(path).parent != self.own:
            raise UiPathError(f"{name!r} leads out of the folder of this page")
        return path


def require_readable_name(places: Places, text: str) -> None:
    """Reject a path outside the page's folders; names of the Hub and of presets are none.

    Raises:
        UiPathError: It is one.
    """
    if not text or find_preset(text) is not None:
        return
    if looks_like_hub_name(text) and not path_exists(to_path(text)):
        return
    if places.models is not None and _resolve(to_path(text)).parent == places.models:
        return
    places.require_readable(text)


def find_places(spec: UiSpec, environ: Mapping[str, str], *, shown: Path) -> Places:
    """The folders that the settings name.

    Args:
        spec: The page's settings.
        environ: The environment, which says where the program's home is.
        shown: The output folder whose runs are shown where the settings name none.

    Raises:
        UiFolderError: The page would write into the system, into credentials or over a whole home.
    """
    own = to_path(spec.output_dir) if spec.output_dir else program_home(environ) / OWN_NAME
    own = require_harmless(own, environ)
    others = [to_path(text) for text in spec.output] or [shown]
    readable = [to_path(text) for text in spec.data_dirs] or [Path.cwd()]
    return Places(
        own,
        tuple(dict.fromkeys(_resolve(path) for path in others)),
        tuple(dict.fromkeys(_resolve(path) for path in readable)),
        _resolve(program_home(environ) / "models"),
    )


def require_harmless(folder: Path, environ: Mapping[str, str]) -> Path:
    """The folder, links resolved, where it is one that a program may fill.

    Raises:
        UiFolderError: It belongs to the system, holds credentials, or is a whole home or disk.
    """
    path = _resolve(folder)
    if path == Path(path.anchor):
        raise UiFolderError(f"{folder} is a whole disk")
    if _is_temporary(path):
        return path
    for spelled in {path, Path(os.path.abspath(folder))}:  # noqa: PTH100  # as written too: /etc may itself be a link
        if any(spelled.is_relative_to(system) for system in _system_folders(environ)):
            raise UiFolderError(f"{folder} belongs to the system")
        if found := [part for part in spelled.parts if part.lower() in _CREDENTIALS]:
            raise UiFolderError(f"{folder} is in {found[0]}, a folder for credentials or a program's own files")
    home = _resolve(Path.home())
    if home.is_relative_to(path):
        raise UiFolderError(f"{folder} is a whole home folder, or above one")
    return path


def _system_folders(environ: Mapping[str, str]) -> Iterable[Path]:
    yield from (Path(text) for text in _SYSTEM if sys.platform != "win32")
    yield from (_resolve(Path(environ[name])) for name in _SYSTEM_VARIABLES if environ.get(name))


def _is_temporary(path: Path) -> bool:
    """Those of macOS are under /private/var."""
    base = _resolve(Path(tempfile.gettempdir()))
    return path != base and path.is_relative_to(base) and base != Path(base.anchor)


def _output(path: Path, *, is_own: bool) -> Output:
    return Output(sha256(str(path).encode()).hexdigest()[:_KEY_DIGITS], path, is_own)


def own_folders(parent: Path) -> list[Path]:
    """The page's output folders: those whose names its forms could give."""
    try:
        with os.scandir(parent) as entries:
            return [parent / e.name for e in entries if e.is_dir(follow_symlinks=False) and _NAME.fullmatch(e.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _resolve(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise UiPathError(f"{path} cannot be read as a path", cause=str(error)) from error
