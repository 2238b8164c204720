"""What `backprop doctor` tries besides the rails' own checks: settings, disk, llama.cpp, Ollama, the Hub, Windows."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import bp_export
from backpropagate import certificate, rails, settings, system
from backpropagate.exporting import read_ollama_host
from bp_export.llama_cpp.classes import VIA
from bp_export.llama_cpp.environment import find_converter, use_environment
from bp_runs.errors import CodedError, first_line
from bp_runs.files import require_folder
from bp_runs.rail import Check, ChecksMachine, Finding

_ROOM = 20 * 2**30
"""Bytes: a 7B model in 16 bits is 15 GB, its GGUF 5 more."""
_HUB_SECONDS = 5.0
_IMPORT_SECONDS = 60.0
_PAGE_FILE = 16 * 2**30
"""Bytes of memory and page file together below which loading a 7B model fails on Windows."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """A check's name and its finding."""

    name: str
    finding: Finding

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        found = self.finding
        return {"name": self.name, "state": found.state, "message": found.message, "fix": found.fix}


def diagnose(environ: Mapping[str, str], output: Path) -> Iterator[Diagnosis]:
    """Try everything, the cheap things first; each diagnosis as soon as it is known.

    Args:
        environ: The environment.
        output: The output folder of the settings.
    """
    for check in own_checks(environ, output):
        yield Diagnosis(check.name, rails.run_check(check))
    statuses = rails.all_rails()
    otherwise: Literal["skipped", "warning"] = "skipped" if any(s.probe.usable for s in statuses) else "warning"
    for status in statuses:
        usable = Finding(state="ok" if status.probe.usable else otherwise, message=status.probe.why)
        yield Diagnosis(f"rail {status.name}", usable)
        rail: object = status.rail
        if isinstance(rail, ChecksMachine):
            for check in rail.checks():
                yield Diagnosis(check.name, rails.run_check(check))


def own_checks(environ: Mapping[str, str], output: Path) -> tuple[Check, ...]:
    """The checks that need no rail."""
    return (
        Check("settings", lambda: check_settings(environ)),
        Check("disk", lambda: check_disk(environ, output), "Choose another folder: {set:output=/other/disk/output}"),
        Check("page file", check_page_file),
        Check("llama.cpp", check_llama_cpp),
        Check("certificates", lambda: check_certificates(environ)),
        Check("ollama", lambda: check_ollama(environ)),
        Check("hub", lambda: check_hub(environ)),
    )


def check_settings(environ: Mapping[str, str]) -> Finding:
    """Whether the environment and backpropagate.toml can be read."""
    found = settings.resolve({}, environ, Path(settings.TOML_FILE))
    changed = sum(source != "default" for source in found.sources.values())
    return Finding(state="ok", message=f"{changed} settings from the environment and {settings.TOML_FILE}")


def check_certificates(environ: Mapping[str, str]) -> Finding:
    """How many classes of models are certified, and whether llama.cpp's converter is installed."""
    rows = [row.certificate for row in certificate.list_support(system.program_home(environ)) if row.certificate]
    here = certificate.read_versions().get("transformers", "none")
    passed = [made for made in rows if made.passed]
    same = sum(made.versions.get("transformers") == here for made in passed)
    with use_environment(system.program_home(environ) / "llama.cpp"):
        converter = "installed" if find_converter() else "not installed, and fetched on first use"
    words = f"{len(passed)} classes of models certified, {same} with transformers {here}"
    return Finding(state="ok", message=f"{words}; the converter of {VIA}: {converter}")


def check_disk(environ: Mapping[str, str], output: Path) -> Finding:
    """Room where models are cached and where runs are written, and whether that can be written."""
    places = {"home": system.program_home(environ), "output": output}
    require_folder(places["home"])
    room = {name: shutil.disk_usage(_existing(place)).free for name, place in places.items()}
    told = ", ".join(f"{name}: {free / 2**30:.0f} GiB free" for name, free in room.items())
    if not os.access(_existing(output), os.W_OK):
        return Finding(
            state="failed", message=f"{output} cannot be written", fix="Choose another folder: {set:output=DIR}"
        )
    if min(room.values()) < _ROOM:
        return Finding(state="warning", message=f"{told}; a 7B model needs 20", fix="Free some space.")
    return Finding(state="ok", message=told)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above that is there."""
    place = folder.resolve()
    return next(parent for parent in (place, *place.parents) if parent.is_dir())


def check_page_file() -> Finding:
    """Windows commits memory before it is used: without a page file, loading a model fails although memory is free."""
    if platform.system() != "Windows":
        return Finding(state="skipped", message="only Windows needs one")
    return judge_page_file(_commit_limit())


def judge_page_file(limit: int) -> Finding:
    """What the limit means.

    Args:
        limit: Bytes of memory and page file together.
    """
    told = f"memory and page file together: {limit / 2**30:.0f} GiB"
    if limit < _PAGE_FILE:
        fix = "Let Windows manage the page file's size: System, Advanced system settings, Performance, Advanced."
        return Finding(state="warning", message=told, fix=fix)
    return Finding(state="ok", message=told)


def _commit_limit() -> int:
    import ctypes

    class Status(ctypes.Structure):
        _fields_ = [
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *(
                (name, ctypes.c_ulonglong)
                for name in ("total", "free", "limit", "left", "virtual", "unused", "extended")
            ),
        ]

    status = Status(length=ctypes.sizeof(Status))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]  # on Windows only
    return int(status.limit)


def check_llama_cpp() -> Finding:
    """Whether llama.cpp loads, in a process of its own as exports use it."""
    fix = "Reinstall it: {install:--force-reinstall xllamacpp}; exports work without, unverified."
    command = [sys.executable, "-c", "import importlib.metadata as m, xllamacpp; print(m.version('xllamacpp'))"]
    try:
        done = subprocess.run(  # noqa: S603  # fixed words
            command, capture_output=True, text=True, check=False, timeout=_IMPORT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return Finding(state="warning", message=f"does not load in {_IMPORT_SECONDS:.0f} s", fix=fix)
    if done.returncode != 0:
        why = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        return Finding(state="warning", message=f"does not load: {why}", fix=fix)
    return Finding(state="ok", message=f"xllamacpp {done.stdout.strip()} loads")


def check_ollama(environ: Mapping[str, str]) -> Finding:
    """Whether Ollama answers."""
    try:
        version = bp_export.ollama.require_ollama(read_ollama_host(environ))
    except CodedError as error:
        return Finding(state="warning", message=f"does not answer: {error.message}", fix=error.fix)
    return Finding(state="ok", message=f"version {version} answers")


def check_hub(environ: Mapping[str, str]) -> Finding:
    """Whether the Hub answers, and knows who asks."""
    if system.is_offline(environ):
        return Finding(state="skipped", message="offline")
    import httpx
    from huggingface_hub import constants, get_token

    try:
        answer = httpx.head(constants.ENDPOINT, timeout=_HUB_SECONDS, follow_redirects=True)
    except httpx.HTTPError as error:
        fix = "Check the connection or the proxy (HTTPS_PROXY); models in the cache and in folders work without."
        return Finding(state="warning", message=f"does not answer: {first_line(error)}", fix=fix)
    who = "logged in" if get_token() else "not logged in: enough for models without a gate"
    return Finding(state="ok", message=f"answers with {answer.status_code}; {who}")
