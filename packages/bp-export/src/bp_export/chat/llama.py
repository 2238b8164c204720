"""Chat with a GGUF in llama.cpp with the file's own chat template.

llama.cpp comes from the package xllamacpp (the extra ``verify``) and runs in a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bp_export.chat.server import LlamaServer
from bp_export.errors import ChatFailedError
from bp_export.gguf.file import read_settings
from bp_export.local_paths import StrPath
from bp_export.verify.template import check_gguf, check_server
from bp_runs.errors import CodedError

_ADDRESS = "/v1/chat/completions"


class LlamaChat:
    """A GGUF loaded in llama.cpp; close it, or use it in a ``with``.

    Args:
        path: The GGUF.
        context: Tokens of prompt and answer together.

    Raises:
        LlamaCppMissingError: xllamacpp is not installed.
        TemplateChangedError: Its chat template renders chats differently than training did.
        ChatFailedError: The file is no GGUF, or llama.cpp cannot load it.
    """

    def __init__(self, path: StrPath, *, context: int = 2048) -> None:
        path = Path(path)
        settings = read_settings(path)
        self.template = settings.get("tokenizer.chat_template")
        """The Jinja template in the file; None without one."""
        self.rendering = check_gguf(path, settings)
        """Whether it renders ten conversations as at training."""
        self._path = path
        self._server: LlamaServer | None = LlamaServer(path, context)
        if self.rendering.result == "passed":
            try:
                check_server(self._server, path, settings)
            except CodedError:
                self.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unload the model; answering after it is an error."""
        if self._server is not None:
            self._server.close()
        self._server = None

    def answer(
        self, messages: Sequence[Mapping[str, str]], max_tokens: int = 128, temperature: float = 0.0, seed: int = 0
    ) -> str:
        """The assistant's next message.

        Args:
            messages: Each with ``role`` and ``content``.
            max_tokens: Tokens at most; the answer ends earlier where the model ends its turn.
            temperature: 0 for always the likeliest token.
            seed: For other temperatures.

        Raises:
            ChatFailedError: The file has no chat template, or llama.cpp answers with an error.
        """
        return str(self.complete(messages, max_tokens, temperature, seed)["message"]["content"] or "")

    def complete(
        self, messages: Sequence[Mapping[str, str]], max_tokens: int = 128, temperature: float = 0.0, seed: int = 0
    ) -> dict[str, Any]:
        """As `answer`, but llama.cpp's whole first choice: ``message``, ``finish_reason`` (``stop`` or ``length``)."""
        request = self._build_request(messages, max_tokens, temperature, seed)
        return _read_choice(self._find_server().post(_ADDRESS, request))

    def stream(
        self, messages: Sequence[Mapping[str, str]], max_tokens: int = 128, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[str]:
        """As `answer`, piece by piece as it is made."""
        for part in self._find_server().stream(_ADDRESS, self._build_request(messages, max_tokens, temperature, seed)):
            yield _read_choice(part).get("delta", {}).get("content") or ""

    def _find_server(self) -> LlamaServer:
        if self._server is None:
            raise ChatFailedError("the model has been unloaded")
        return self._server

    def _build_request(
        self, messages: Sequence[Mapping[str, str]], max_tokens: int, temperature: float, seed: int
    ) -> dict[str, Any]:
        if not self.template:
            raise ChatFailedError(f"{self._path} has no chat template", fix="Export it with a tokenizer that has one.")
        return {
            "messages": [dict(message) for message in messages],
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
            # What the model thinks is a part of what it was trained to say.
            "reasoning_format": "none",
        }


def _read_choice(reply: Any) -> dict[str, Any]:
    try:
        return dict(reply["choices"][0])
    except (KeyError, IndexError, TypeError) as error:
        raise ChatFailedError("llama.cpp could not answer", cause=str(reply)[:500]) from error
