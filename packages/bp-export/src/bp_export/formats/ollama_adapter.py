"""An adapter for Ollama by itself: a folder with a GGUF LoRA and the Modelfile that puts it on a model there.

    adapter.gguf   the LoRA, as llama.cpp reads it
    Modelfile      FROM, ADAPTER and stop words, for `ollama create`
    base.json      {"base", "config_sha256", "from", "layout": {GGUF key: value}, "stop", "template": hashes | None}

Ollama 0.34.1 and later reject adapters; the way there is a merged GGUF.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from gguf import GGUFReader

from bp_data.templates.render_hashes import ConversationHashes
from bp_export.architectures import Architecture
from bp_export.errors import AdapterFormatError
from bp_export.formats.gguf_adapter import AdapterRequest, write_gguf_adapter
from bp_export.formats.output import require_free_folder, write_mark
from bp_export.formats.request import Format
from bp_export.source import Source, read_config
from bp_export.tokenizer.vocabulary import read_vocabulary
from bp_merge import AdapterMismatchError, FoldedModel, LoraAdapter
from bp_runs.files import publish_folder, publish_json, sha256_file

ADAPTER_FILE, MODELFILE, BASE_FILE = "adapter.gguf", "Modelfile", "base.json"


@dataclass(frozen=True, slots=True)
class OllamaAdapter:
    """A folder that `OllamaAdapterExport` wrote, read back."""

    path: Path
    """The adapter's GGUF."""
    runs_on: str
    """A model's name in Ollama, or the path of a GGUF."""
    layout: Mapping[str, Any]
    """GGUF settings that its base has: architecture, layers, width."""
    stop: tuple[str, ...]
    hashes: ConversationHashes | None = None
    """How training rendered ten conversations; None if it did not store that."""
    context: int | None = None
    """Longest text that Ollama reads as the model does, in tokens; None for no such bound."""

    @property
    def base_file(self) -> Path | None:
        """The base's GGUF, where it is one and not a name."""
        return Path(self.runs_on) if self.runs_on.endswith(".gguf") else None


@dataclass(frozen=True, slots=True, kw_only=True)
class OllamaAdapterExport(AdapterRequest):
    """The format ``ollama-adapter``."""

    format: ClassVar[Format] = "ollama-adapter"
    ending: ClassVar[str] = "-ollama"

    ollama_base: str | None = None
    """What the adapter continues: the base's name in Ollama, or the path of a GGUF of it, which is compared with it."""

    def write_adapter(
        self, source: Source, model: FoldedModel, adapter: LoraAdapter, architecture: Architecture, target: Path
    ) -> tuple[int, int, str]:
        """Write the folder.

        Raises:
            AdapterMismatchError: The GGUF is of another base.
            AdapterFormatError: No base is named, or it looks like a path and there is no GGUF.
        """
        runs_on = self.ollama_base
        if runs_on is None:
            raise AdapterFormatError(
                "an adapter for Ollama goes on a model there, and none is named",
                fix="Name the same base as Ollama has it, or a GGUF of it: {set:ollama_base=smollm2:135m}",
            )
        require_free_folder(target, force=self.force, sources=source.folders)
        if runs_on.endswith(".gguf"):
            check_base(Path(runs_on), model, architecture)
        stop = _read_stop(source)
        lines = [f"FROM {runs_on}", f"ADAPTER ./{ADAPTER_FILE}"]
        lines += [f"PARAMETER stop {json.dumps(word)}" for word in stop]
        if architecture.ignored_window is not None:
            lines.append(f"PARAMETER num_ctx {architecture.ignored_window}")
        with publish_folder(target) as folder:
            path = folder / ADAPTER_FILE
            tensors, _, sha256 = write_gguf_adapter(model, adapter, architecture, path, name=source.name)
            (folder / MODELFILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
            publish_json(folder / BASE_FILE, _describe_base(source, adapter, architecture, runs_on, stop))
            write_mark(folder, "ollama-adapter")
        return tensors, sum(file.stat().st_size for file in target.iterdir()), sha256


def _read_stop(source: Source) -> list[str]:
    words = read_vocabulary(source.tokenizer, vocab_size=None, model_config=read_config(source.base), pre="default")
    return [] if words.turn_end is None else [str(words.tokens[words.turn_end])]


def _describe_base(
    source: Source, adapter: LoraAdapter, architecture: Architecture, runs_on: str, stop: Sequence[str]
) -> dict[str, Any]:
    return {
        "base": adapter.folder.base,
        "config_sha256": sha256_file(source.base / "config.json"),
        "from": runs_on,
        "layout": _read_layout(architecture),
        "stop": list(stop),
        "context": architecture.ignored_window,
        "template": None if source.hashes is None else source.hashes.to_dict(),
    }


def read_ollama_adapter(folder: Path) -> OllamaAdapter:
    """Read the folder back.

    Raises:
        AdapterFormatError: It is no such folder, or the base's GGUF is gone.
    """
    try:
        told = json.loads((folder / BASE_FILE).read_bytes())
        hashes = ConversationHashes.from_dict(told.get("template"))
        layout, stop = dict(told["layout"]), tuple(told["stop"])
        found = OllamaAdapter(folder / ADAPTER_FILE, str(told["from"]), layout, stop, hashes, told.get("context"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterFormatError(
            f"{folder} is no folder of the format ollama-adapter",
            cause=str(error),
            fix="Write one: {do:export ADAPTER format=ollama-adapter ollama_base=NAME}; or register a GGUF.",
        ) from error
    for file in (found.path, *([found.base_file] if found.base_file else [])):
        if not file.is_file():
            raise AdapterFormatError(
                f"{file} is missing", fix="Export the adapter again: {do:export ADAPTER format=ollama-adapter}"
            )
    return found


def require_same_layout(adapter: OllamaAdapter, settings: Mapping[str, Any]) -> None:
    """Compare a base that Ollama has with the adapter's by architecture, layers and width; its weights stay unseen.

    Raises:
        AdapterMismatchError: One differs.
    """
    for key, expected in adapter.layout.items():
        if settings.get(key) != expected:
            raise AdapterMismatchError(
                f"{adapter.runs_on} is not the adapter's base: its {key} is {settings.get(key)}, and not {expected}"
            )


def _read_layout(architecture: Architecture) -> dict[str, Any]:
    name = architecture.name
    return {
        "general.architecture": name,
        f"{name}.block_count": architecture.layers,
        f"{name}.embedding_length": architecture.width,
    }


def check_base(path: Path, model: FoldedModel, architecture: Architecture) -> None:
    """Compare a GGUF's vectors with the base's: norms are float32 in every quantization, and differ from base to base.

    Raises:
        AdapterMismatchError: One is missing or differs.
        AdapterFormatError: The file is no GGUF.
    """
    try:
        found = {tensor.name: np.asarray(tensor.data) for tensor in GGUFReader(path).tensors if len(tensor.shape) == 1}
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise AdapterFormatError(f"{path} cannot be read as GGUF", cause=str(error)) from error
    for source, info in model.tensors.items():
        target = architecture.map_name(source)
        if target is None or len(info.shape) != 1:
            continue
        change = architecture.plan_change(architecture.clean_name(source), info.shape)
        expected = change.read_rows(model, source, 0, 1).reshape(-1)
        if not np.array_equal(found.get(target, np.empty(0)), expected):
            raise AdapterMismatchError(f"{path} is not the adapter's base: its {target} differs")
