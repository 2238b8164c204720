"""Checkpoints of a run: each is whole with its hashes, or it is not there.

    <run>/checkpoints/step-000040-9f2c1a/    what the rail wrote, settings.json and manifest.json
    manifest.json    {"schema", "run_id", "rail", "step", "sequence", "saved_at", "reason", "score", "facts",
                      "files": {name: {"sha256", "bytes"}}, "sha256": of all this}
    protected        empty; the checkpoint is never pruned
    damaged          what was found wrong with its files; it counts no more, and goes when a newer one is damaged

A save writes into a hidden folder, hashes and fsyncs every file, writes the manifest, fsyncs the folder and renames it.
Until then the earlier ones stay. Which one is the newest is known by the manifests' ``sequence``, never by a name or a
clock. Every rail saves and reads its checkpoints here; what is in their files is the rail's own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson

from bp_runs import paths
from bp_runs.errors import CheckpointInvalidError
from bp_runs.files import (
    coded_disk_errors,
    fsync_file,
    fsync_folder,
    publish_bytes,
    rename,
    require_free_space,
    sha256_file,
)
from bp_runs.record import utc_now
from bp_runs.wording import command_ref

MANIFEST_FILE = "manifest.json"
PROTECTED_FILE = "protected"
DAMAGED_FILE = "damaged"
CHECKPOINT_SCHEMA = "backpropagate.checkpoint/1"
_NOT_HASHED = (MANIFEST_FILE, PROTECTED_FILE, DAMAGED_FILE)

Reason = Literal["schedule", "stop", "temperature", "asked"]
"""Every so many steps or minutes; the user stopped the run; the GPU is too hot; somebody asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a manifest says; the files' hashes have not been compared."""

    path: Path
    run_id: str
    rail: str
    step: int
    """Optimizer steps that are done."""
    sequence: int
    """Counts the run's saves."""
    saved_at: str
    reason: Reason
    score: float | None
    """Validation loss in nats when it was saved; lower is better."""
    facts: Mapping[str, Any]
    """What the rail wants to know without opening its files."""
    files: Mapping[str, Mapping[str, Any]]
    """By name relative to the folder: ``sha256`` and ``bytes``."""

    @property
    def bytes(self) -> int:
        """Size of its files."""
        return sum(file["bytes"] for file in self.files.values())

    @property
    def is_protected(self) -> bool:
        """Whether pruning passes it over."""
        return (self.path / PROTECTED_FILE).exists()

    def damage(self) -> str | None:
        """The first file that is gone or whose bytes are not what was saved; None when all hold."""
        for name, saved in self.files.items():
            file = self.path / name
            try:
                if file.stat().st_size != saved["bytes"] or sha256_file(file) != saved["sha256"]:
                    return f"{name} is not what was saved"
            except FileNotFoundError:
                return f"{name} is missing"
            except OSError as error:
                return f"{name} cannot be read: {error.strerror}"
        return None


class CheckpointFolder:
    """All checkpoints of one run. One process at a time may save: the one that holds the run.

    Args:
        run: The run's folder.
        keep: The newest checkpoints that stay; besides them the one with the lowest score, and protected ones.
    """

    def __init__(self, run: Path, *, keep: int = 2) -> None:
        self.path = run / paths.CHECKPOINTS
        self._keep = max(1, keep)

    def read(self) -> list[Checkpoint]:
        """Checkpoints whose manifests hold, newest first; without those that are known to be damaged."""
        return [c for c in self._with_manifests() if not (c.path / DAMAGED_FILE).exists()]

    def read_damaged(self) -> dict[str, str]:
        """What is known to be wrong, by folder name: a manifest that does not hold, or what `note_damage` noted."""
        manifests = {c.path: c for c in self._with_manifests()}
        found = {f.name: "its manifest is damaged" for f in self._folders() if f not in manifests}
        for folder in manifests:
            with contextlib.suppress(OSError):
                found[folder.name] = (folder / DAMAGED_FILE).read_text(encoding="utf-8", errors="replace")
        return found

    def note_damage(self, damaged: Mapping[str, str]) -> None:
        """Let what `newest_whole` found wrong be known, so that no whole checkpoint is pruned for a damaged one.

        Raises:
            DiskFullError, OutputNotWritableError: It cannot be noted.
        """
        for checkpoint in self._with_manifests():
            note, wrong = checkpoint.path / DAMAGED_FILE, damaged.get(checkpoint.path.name)
            if wrong is not None and not note.exists():
                publish_bytes(note, wrong.encode())
            elif wrong is None:
                note.unlink(missing_ok=True)

    def newest_whole(self) -> tuple[Checkpoint | None, dict[str, str]]:
        """The newest checkpoint whose every byte is what was saved, and what is wrong with those after it, by name.

        Returns:
            None as the checkpoint where there is none at all.

        Raises:
            CheckpointInvalidError: There are some, and none is whole.
        """
        known, damaged = self.read(), self.read_damaged()
        mended = [c for c in self._with_manifests() if c.path.name in damaged]  # perhaps, from a backup
        for checkpoint in (*known, *mended):
            wrong = checkpoint.damage()
            if wrong is None:
                damaged.pop(checkpoint.path.name, None)
                return checkpoint, damaged
            damaged[checkpoint.path.name] = wrong
        if damaged:
            told = "; ".join(f"{name}: {wrong}" for name, wrong in damaged.items())
            run = self.path.parent
            again = command_ref("replay", run.name, output=run.parent.parent)
            raise CheckpointInvalidError(
                f"no checkpoint in {self.path} is whole",
                cause=told,
                fix=f"Start from scratch with the same settings: {again}",
                details=damaged,
            )
        return None, {}

    @contextlib.contextmanager
    def save(
        self,
        *,
        run_id: str,
        rail: str,
        step: int,
        need: int,
        reason: Reason = "schedule",
        score: float | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> Iterator[Path]:
        """Yield an empty folder to write into; when the context is left without an error it is a checkpoint.

        Args:
            need: Bytes that the files will take, about; looked for on the disk first. Where they are missing, damaged
                checkpoints go, then older ones before their time, but never the newest whole one.

        Raises:
            DiskFullError, OutputNotWritableError: Nothing is left of the attempt, and the earlier ones stay.
        """
        with coded_disk_errors(self.path):
            if not self.path.exists():
                self.path.mkdir()
                fsync_folder(self.path.parent)
            self._sweep()
            self._make_room(need)
            name = f"step-{step:06d}-{os.urandom(3).hex()}"
            partial = self.path / f".{name}.partial"
            partial.mkdir()
            try:
                yield partial
                manifest = {
                    "schema": CHECKPOINT_SCHEMA,
                    "run_id": run_id,
                    "rail": rail,
                    "step": step,
                    "sequence": self._next_sequence(),
                    "saved_at": utc_now(),
                    "reason": reason,
                    "score": score,
                    "facts": dict(facts or {}),
                    "files": _settle_files(partial),
                }
                _write_manifest(partial, manifest)
                rename(partial, self.path / name)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            fsync_folder(self.path)
        self.prune()

    def prune(self) -> None:
        """Remove what the policy does not keep: the last ones, the best, protected ones; and one damaged for a look."""
        whole = self.read()
        kept = {c.path for c in whole[: self._keep]} | {c.path for c in whole if c.is_protected}
        scored = [c for c in whole if c.score is not None]
        if scored:
            kept.add(min(scored, key=lambda c: (c.score, -c.sequence)).path)
        for checkpoint in whole:
            if checkpoint.path not in kept:
                self._remove(checkpoint.path)
        self._remove_damaged(leave=1)

    def clear(self) -> None:
        """Remove all but protected ones: for a run that will never continue."""
        for folder in self._folders():
            if not (folder / PROTECTED_FILE).exists():
                self._remove(folder)
        self._sweep()

    def protect(self, step: int) -> Checkpoint:
        """Keep the newest checkpoint of ``step`` for good.

        Raises:
            CheckpointInvalidError: There is none of that step.
        """
        for checkpoint in self.read():
            if checkpoint.step == step:
                with coded_disk_errors(checkpoint.path):
                    (checkpoint.path / PROTECTED_FILE).touch()
                return checkpoint
        run = self.path.parent
        shown = command_ref("show-run", run.name, output=run.parent.parent)
        raise CheckpointInvalidError(f"{self.path} has no checkpoint of step {step}", fix=f"See them: {shown}")

    def _folders(self) -> list[Path]:
        try:
            return sorted(p for p in self.path.iterdir() if not p.name.startswith(".") and p.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _with_manifests(self) -> list[Checkpoint]:
        found = [read_manifest(folder) for folder in self._folders()]
        return sorted((c for c in found if c is not None), key=lambda c: c.sequence, reverse=True)

    def _next_sequence(self) -> int:
        return 1 + max((c.sequence for c in self._with_manifests()), default=0)

    def _remove_damaged(self, *, leave: int) -> None:
        """Names begin with the step; one that the user protects is the user's to remove."""
        names = sorted(name for name in self.read_damaged() if not (self.path / name / PROTECTED_FILE).exists())
        for name in names[: len(names) - leave]:
            self._remove(self.path / name)

    def _make_room(self, need: int) -> None:
        if shutil.disk_usage(self.path).free < need:
            self._remove_damaged(leave=0)
        if shutil.disk_usage(self.path).free < need:
            with contextlib.suppress(CheckpointInvalidError):
                newest, _ = self.newest_whole()
                for older in self.read():
                    if newest and older.path != newest.path and not older.is_protected:
                        self._remove(older.path)
        require_free_space(self.path, need, "a checkpoint")

    def _remove(self, folder: Path) -> None:
        """Out of sight in one step, so that a kill leaves no half of it to be found."""
        gone = folder.with_name(f".{folder.name}.old")
        with coded_disk_errors(folder):
            rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _sweep(self) -> None:
        """What a killed process was writing or removing."""
        for leftover in self.path.glob(".*.*"):
            shutil.rmtree(leftover, ignore_errors=True)


def read_manifest(folder: Path) -> Checkpoint | None:
    """The checkpoint in ``folder``; None where its manifest is missing or damaged."""
    try:
        data = orjson.loads((folder / MANIFEST_FILE).read_bytes())
        if data.pop("sha256") != _digest(data) or data["schema"] != CHECKPOINT_SCHEMA:
            return None
        names = ("run_id", "rail", "step", "sequence", "saved_at", "reason", "score", "facts", "files")
        return Checkpoint(path=folder, **{name: data[name] for name in names})
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        return None


def _settle_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Hash and fsync every file; folders below are fsynced too."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            fsync_folder(path)
        elif path.name not in _NOT_HASHED:
            fsync_file(path)
            name = path.relative_to(folder).as_posix()
            files[name] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    return files


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Publish the manifest with its own digest; that fsyncs file and folder."""
    body = {**manifest, "sha256": _digest(manifest)}
    publish_bytes(folder / MANIFEST_FILE, orjson.dumps(body, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def _digest(manifest: Mapping[str, Any]) -> str:
    import hashlib  # half of what a list of checkpoints takes to start

    return hashlib.sha256(orjson.dumps(dict(manifest), option=orjson.OPT_SORT_KEYS)).hexdigest()
