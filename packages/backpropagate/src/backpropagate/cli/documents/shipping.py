"""Documents of commands that bring a model to others: export, push, chat, Ollama."""

from __future__ import annotations

from typing import Any, TypedDict


class Rendering(TypedDict):
    """Whether a chat template renders ten conversations as at training."""

    result: str
    note: str


class Export(TypedDict):
    """`backprop export`."""

    path: str
    format: str
    quantization: str | None
    bytes: int
    tensors: int
    seconds: float
    sha256: str
    rendering: Rendering
    parity: dict[str, Any] | None
    kernels: str | None
    notes: list[str]
    mmproj: str | None
    via: str | None
    ollama: str | None
    ollama_context: int | None
    ollama_parity: dict[str, Any] | None
    run_id: str | None


class PlannedTensor(TypedDict):
    """A tensor of a GGUF that is planned."""

    name: str
    source: str | None
    type: str
    shape: list[int]
    bytes: int
    is_changed: bool


class ExportPlan(TypedDict):
    """`backprop export --dry-run`."""

    path: str
    tensors: list[PlannedTensor]
    bytes: int
    free_bytes: int
    seconds: float
    notes: list[str]


class Imatrix(TypedDict):
    """`backprop imatrix`."""

    path: str
    tensors: int
    chunks: int
    tokens: int


class Push(TypedDict):
    """`backprop push`."""

    repo: str
    url: str
    commit: str
    files: list[str]
    bytes: int
    run_id: str | None


class PushPlan(TypedDict):
    """`backprop push --dry-run`."""

    repo: str
    files: list[str]
    card: str


class Chat(TypedDict):
    """`backprop chat --prompt`."""

    target: str
    prompt: str
    answer: str
    rendering: Rendering


class OllamaRegister(TypedDict):
    """`backprop ollama register`."""

    name: str
    host: str
    version: str
    template: str
    stop: list[str]
    is_raw: bool
    answer: str | None
    rendering: Rendering
    context: int | None
    parity: dict[str, Any] | None


class OllamaRow(TypedDict):
    """A model that Ollama has."""

    name: str
    bytes: int
    digest: str


class OllamaList(TypedDict):
    """`backprop ollama list`."""

    models: list[OllamaRow]


class OllamaRemoved(TypedDict):
    """`backprop ollama rm`."""

    removed: str
