"""The adapter by itself, as PEFT has it: a copy of its folder."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from bp_data.templates.render_hashes import ConversationHashes
from bp_export.formats.output import MARK_FILE, require_free_folder, write_mark
from bp_export.formats.request import (
    ExportOutcome,
    ExportPlan,
    ExportRequest,
    Format,
    PlannedTensor,
    Progress,
    summarize_plan,
)
from bp_export.source import TOKENIZER_FILE, name_after
from bp_export.verify.report import ParityReport
from bp_export.verify.template import check_folder, read_trained_hashes
from bp_merge import read_index
from bp_runs.adapter import TEMPLATE_FOLDER, AdapterFolder, read_adapter_folder
from bp_runs.files import publish_folder, require_folder, require_free_space, sha256_file


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraExport(ExportRequest):
    """The format ``lora``."""

    format: ClassVar[Format] = "lora"

    def plan(self) -> ExportPlan:
        """The adapter's tensors."""
        folder = read_adapter_folder(self.adapter)
        infos = read_index(folder.weights).values()
        tensors = tuple(PlannedTensor(i.name, i.name, i.dtype, i.shape, i.bytes, is_changed=True) for i in infos)
        return summarize_plan(self.find_target(folder), tensors)

    def write(self, progress: Progress | None = None) -> ExportOutcome:
        """Write the folder."""
        del progress  # adapters are small
        begun = time.monotonic()
        folder = read_adapter_folder(self.adapter)
        target = self.find_target(folder)
        require_free_folder(target, force=self.force, sources=[self.adapter])
        rendering = check_folder(self.adapter, find_hashes(self.adapter))
        tensors, size, sha256 = self.write_folder(folder, target)
        parity = self.verify_written(folder, target)
        seconds = time.monotonic() - begun
        return ExportOutcome(target, self.format, None, size, tensors, seconds, sha256, rendering, parity)

    def verify_written(self, folder: AdapterFolder, target: Path) -> ParityReport | None:
        """Compare the written folder with the adapter; None for a copy, whose bytes are the adapter's.

        Raises:
            ParityFailedError: They differ.
        """
        del folder, target
        return None

    def find_target(self, folder: AdapterFolder) -> Path:
        """Where it is written."""
        return self.output or self.adapter.parent / f"{self.name or name_after(folder.base)}-{self.format}"

    def write_folder(self, folder: AdapterFolder, target: Path) -> tuple[int, int, str]:
        """Write the adapter's form; returns tensors, bytes of all files, and the SHA-256 of the weights."""
        return copy_adapter(folder, target)


def find_hashes(adapter: Path) -> ConversationHashes | None:
    """What training stored, if the folder holds its own tokenizer; else the template stayed with the base."""
    return read_trained_hashes(adapter) if (adapter / TOKENIZER_FILE).is_file() else None


def copy_adapter(adapter: AdapterFolder, output: Path) -> tuple[int, int, str]:
    """Copy an adapter folder's files to ``output``; of its sub-folders only the one with chat templates.

    Returns:
        Tensors, bytes of all files, and the SHA-256 of the weights.

    Raises:
        TensorsInvalidError: The weights are damaged; they are looked at before anything is copied.
        DiskFullError, OutputNotWritableError: As named; no folder is left.
    """
    tensors = read_index(adapter.weights)
    files = [file for file in adapter.path.iterdir() if file.is_file() and file.name != MARK_FILE]
    size = sum(file.stat().st_size for file in files)
    require_folder(output.parent)
    require_free_space(output.parent, size, "the adapter's copy")
    with publish_folder(output) as folder:
        for file in files:
            shutil.copyfile(file, folder / file.name)
        if (adapter.path / TEMPLATE_FOLDER).is_dir():
            shutil.copytree(adapter.path / TEMPLATE_FOLDER, folder / TEMPLATE_FOLDER)
        write_mark(folder, "lora")
    return len(tensors), size, sha256_file(output / adapter.weights.name)
