"""Chat with whatever was made: a GGUF, an adapter, a model folder, or a model in Ollama.

An adapter or a model folder becomes a GGUF in the base's own type for as long as the talk lasts, and llama.cpp runs
that: no torch, the same arithmetic as what is exported, and disk for one copy of the model. It does not use a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from bp_export.chat.llama import LlamaChat
from bp_export.formats.temporary import open_gguf
from bp_export.local_paths import StrPath
from bp_export.ollama.register import stream_answer
from bp_export.verify.template import RenderingCheck

CONTEXT = 4096

Messages = Sequence[Mapping[str, str]]


class ChatSession(Protocol):
    """Something that answers."""

    @property
    def rendering(self) -> RenderingCheck:
        """Whether its chat template renders ten conversations as at training."""
        ...

    def stream(self, messages: Messages, max_tokens: int, temperature: float, seed: int) -> Iterator[str]:
        """The next message, piece by piece.

        Raises:
            CodedError: It cannot answer.
        """
        ...


@dataclass(frozen=True, slots=True)
class OllamaSession:
    """A model in Ollama."""

    name: str
    host: str | None = None

    @property
    def rendering(self) -> RenderingCheck:
        """Never tested here: the template was checked when the model was registered."""
        return RenderingCheck("not tested", "not tested: a model in Ollama is checked when it is registered")

    def stream(self, messages: Messages, max_tokens: int, temperature: float, seed: int) -> Iterator[str]:
        """As `bp_export.ollama.register.stream_answer`."""
        yield from stream_answer(
            self.name, messages, self.host, max_tokens=max_tokens, temperature=temperature, seed=seed
        )


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How answers are made."""

    system: str | None = None
    """Said before everything else."""
    max_tokens: int = 512
    """Of an answer, at most."""
    temperature: float = 0.0
    """0 for always the likeliest token."""
    seed: int = 0


@contextlib.contextmanager
def open_session(
    target: StrPath,
    *,
    base: StrPath | None = None,
    context: int = CONTEXT,
    quantization: str | None = None,
    dequantize: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[ChatSession]:
    """Something on this disk to talk to, for as long as the block lasts.

    Args:
        target: A GGUF, an adapter folder or a model folder.
        base: The base's folder, where it is not the one that the adapter names.
        context: Tokens of question and answer together, and of what was said before.
        quantization: What a folder becomes to be run; by default the type of its base's weights.
        dequantize: As `bp_export.export_adapter`.
        progress: Called with bytes done and bytes in all while a folder is made ready.

    Raises:
        ChatTargetError: There is nothing of that name.
        CodedError: As `bp_export.export_adapter` and `LlamaChat`.
    """
    with (
        open_gguf(target, base=base, quantization=quantization, dequantize=dequantize, progress=progress) as path,
        LlamaChat(path, context=context) as chat,
    ):
        yield chat


def ask_once(talk: ChatSession, prompt: str, options: ChatOptions) -> Iterator[str]:
    """The answer to one message, piece by piece."""
    return _answer(talk, [*_begin(options), {"role": "user", "content": prompt}], options)


def _begin(options: ChatOptions) -> list[dict[str, str]]:
    return [{"role": "system", "content": options.system}] if options.system else []


def _answer(talk: ChatSession, messages: Messages, options: ChatOptions) -> Iterator[str]:
    return talk.stream(messages, options.max_tokens, options.temperature, options.seed)
