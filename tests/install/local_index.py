"""A package index on this machine: our wheels, a stand-in for PyPI's older tool, and what our packages depend on.

Small dependencies are the real wheels of the lock. Large ones are empty wheels of the same name and version: what is
tested is which program an installer chooses, not torch.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from documented import ROOT
from packaging.requirements import Requirement

_SMALL = 1_500_000
"""Bytes; a larger wheel is replaced by an empty one."""
BACKENDS = ("setuptools>=77", "uv-build>=0.9,<0.14", "wheel")
OLDER_TOOL = """def main():
    print("backpropagate 1.8.5")
"""


def write_wheel(
    folder: Path, name: str, version: str, *, extras: tuple[str, ...] = (), module: str = "", scripts: str = ""
) -> Path:
    """Write a wheel that holds one module, or nothing."""
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    provides = "".join(f"Provides-Extra: {extra}\n" for extra in extras)
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{provides}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    if module:
        files[f"{name.replace('-', '_')}/__init__.py"] = module
    if scripts:
        files[f"{info}/entry_points.txt"] = f"[console_scripts]\n{scripts}\n"
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    wheel = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return wheel


def read_pins(extras: tuple[str, ...]) -> dict[str, str]:
    """Name and version of everything that `backpropagate` with the extras needs on this machine, by the lock."""
    command = ["uv", "export", "--frozen", "--no-dev", "--no-hashes", "--no-emit-workspace", "--quiet"]
    command += ["--package", "backpropagate", *(f"--extra={extra}" for extra in extras)]
    exported = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    pins = {}
    for line in exported.splitlines():
        if line and line[0] not in " #-.":
            wanted = Requirement(line)
            if wanted.marker is None or wanted.marker.evaluate():
                pins[wanted.name] = next(iter(wanted.specifier)).version
    return pins


def is_small(name: str, version: str, lock: dict) -> bool:
    """Whether all wheels of a package in the lock are small."""
    found = next(p for p in lock["package"] if (p["name"], p["version"]) == (name, version))
    return bool(found.get("wheels")) and max(wheel.get("size", 0) for wheel in found["wheels"]) < _SMALL


def fill_index(folder: Path, ours: Path) -> None:
    """Put wheels into a folder: ours, the older tool, small dependencies, and empty ones for large dependencies."""
    for wheel in ours.glob("*.whl"):
        os.link(wheel, folder / wheel.name)
    extras = ("ui", "standard", "full", "export", "monitoring", "gpu")
    write_wheel(
        folder, "backpropagate", "1.8.5", extras=extras, module=OLDER_TOOL, scripts="backprop = backpropagate:main"
    )
    lock = tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))
    pins = read_pins(("full", "quickstart"))
    real = [f"{name}=={version}" for name, version in pins.items() if is_small(name, version, lock)]
    for name, version in pins.items():
        if not is_small(name, version, lock):
            write_wheel(folder, name, version)
    download = ["uv", "tool", "run", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*download, "--dest", str(folder), *BACKENDS, *real], check=True)


class _Index(SimpleHTTPRequestHandler):
    """PEP 503: `/simple/NAME/` lists a project's files, `/NAME-….whl` is one."""

    def do_GET(self) -> None:  # the base class names it so
        parts = self.path.strip("/").split("/")
        if parts[0] != "simple" or len(parts) != 2:
            return super().do_GET()
        files = [f for f in sorted(Path(self.directory).iterdir()) if _project(f.name) == parts[1]]
        links = "".join(f'<a href="/{f.name}#sha256={_hash(f)}">{f.name}</a>\n' for f in files)
        body = f"<!DOCTYPE html><html><body>{links}</body></html>".encode()
        self.send_response(200 if files else 404)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        return None

    def log_message(self, *_) -> None:
        """Say nothing."""


def _project(file: str) -> str:
    return file.split("-", maxsplit=1)[0].lower().replace("_", "-").replace(".", "-")


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@contextmanager
def serve_index(folder: Path) -> Iterator[str]:
    """Serve a folder of wheels; yields the address of the index."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Index, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/simple/"
    finally:
        server.shutdown()
        server.server_close()
