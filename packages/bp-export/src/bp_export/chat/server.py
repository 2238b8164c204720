"""llama.cpp's server in a process of its own: what it does to a bad file, or to another ggml, stays there.

`python -m bp_export.chat.server FILE CONTEXT [ADAPTER]` loads a GGUF through xllamacpp. It prints one line of JSON with
its ``address`` or an ``error``, and serves on a loopback port until its standard input closes, which it does when the
parent ends in any way.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from bp_export.errors import ChatFailedError, ContextFullError, LlamaCppMissingError

_QUIET = -1
_END = "[DONE]"
_MORE_ROOM = "Give it more room: {set:context=8192}; or ask a shorter question."
_LAST_WORDS = 500  # characters of stderr that an error carries
_WAIT_SECONDS, _LAST_SECONDS = 10.0, 1.0
_ANSWER_SECONDS = 600.0
_STDERR_TAIL_BYTES = 8192
_CHUNK_BYTES = 65536
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class LlamaServer:
    """A GGUF served by llama.cpp at ``address``; close it.

    Raises:
        LlamaCppMissingError: xllamacpp is not installed.
        ChatFailedError: llama.cpp cannot load the file, or died of it.
    """

    def __init__(self, path: Path, context: int, *, adapter: Path | None = None) -> None:
        require_installed()
        command = [sys.executable, "-m", "bp_export.chat.server", str(path), str(context)]
        self._process = subprocess.Popen(  # noqa: S603  # our own module in our own interpreter
            [*command, *([str(adapter)] if adapter else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._words = PipeReader(self._process.stderr) if self._process.stderr else None
        try:
            self.address: str = self._read_address(path)
            """``http://127.0.0.1:port``."""
        except KeyboardInterrupt:  # loading takes long, and Ctrl-C does not end it by itself
            self._process.kill()
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The server's answer to a JSON request, parsed.

        Raises:
            ChatFailedError: It answers with an error, or not at all.
        """
        with self._coded(), self._open(path, body) as reply:
            return json.loads(reply.read())

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[Any]:
        """The parts of the server's answer to a request with ``"stream": true``, parsed, as they come.

        The parts are server-sent events: lines of ``data: {…}``, the last of which is ``data: [DONE]``.

        Raises:
            ChatFailedError: It answers with an error, or breaks off.
        """
        with self._coded(), self._open(path, {**body, "stream": True}) as reply:
            for line in reply:
                kind, _, data = line.decode().partition(":")
                if kind == "error":
                    raise ChatFailedError("llama.cpp could not answer", cause=data.strip()[:500])
                if kind == "data" and data.strip() == _END:
                    return
                if kind == "data":
                    yield json.loads(data)
        raise ChatFailedError("llama.cpp broke off its answer")

    def _open(self, path: str, body: Mapping[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.address + path, json.dumps(body).encode(), headers)  # noqa: S310  # ours
        return _DIRECT.open(request, timeout=_ANSWER_SECONDS)

    def close(self) -> None:
        """Unload the model."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        try:
            self._process.wait(_WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._read_last_words()

    def _read_address(self, path: Path) -> str:
        line = b"" if self._process.stdout is None else self._process.stdout.readline()
        told = json.loads(line) if line.startswith(b"{") else {}
        if "address" in told:
            return str(told["address"])
        words = told.get("error") or self._read_last_words() or "it died without a word"
        self.close()
        if told.get("missing"):
            raise LlamaCppMissingError("xllamacpp is not installed", cause=words)
        raise ChatFailedError(f"llama.cpp cannot load {path}", cause=words)

    def _read_last_words(self) -> str:
        """What a process that is ending said at last; empty where it said nothing."""
        return self._words.wait(_LAST_SECONDS)[-_LAST_WORDS:] if self._words else ""

    @contextlib.contextmanager
    def _coded(self) -> Iterator[None]:
        try:
            yield
        except urllib.error.HTTPError as error:
            with error:
                words = error.read()[:500].decode(errors="replace")
            if "context size" in words:
                raise ContextFullError(
                    "the conversation is longer than the context", cause=words, fix=_MORE_ROOM
                ) from error
            raise ChatFailedError("llama.cpp could not answer", cause=words) from error
        except (OSError, ValueError, HTTPException) as error:
            raise ChatFailedError("llama.cpp could not answer", cause=self._explain(error)) from error

    def _explain(self, error: Exception) -> str:
        """The error, and where the process died of it its last words."""
        try:
            status = self._process.wait(_LAST_SECONDS)
        except subprocess.TimeoutExpired:
            return str(error)
        return f"{error}; llama.cpp ended with status {status}: {self._read_last_words() or 'without a word'}"


class PipeReader:
    """Reads a pipe to its end in a thread, since a full pipe would stop the child, and keeps the last bytes.

    Args:
        pipe: Buffered; it is closed at its end, by nobody else.
    """

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        self._tail = b""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> str:
        """The last words, once the pipe has ended; what came so far where it does not."""
        self._thread.join(seconds)
        return self._tail.decode(errors="replace").strip()

    def _read(self) -> None:
        with self._pipe as pipe:
            while chunk := pipe.read1(_CHUNK_BYTES):  # type: ignore[attr-defined]  # a BufferedReader's
                self._tail = (self._tail + chunk)[-_STDERR_TAIL_BYTES:]


def is_installed() -> bool:
    """Whether llama.cpp can be imported; it is not imported for that."""
    try:
        return find_spec("xllamacpp") is not None
    except ImportError:
        return False


def require_installed() -> None:
    """Reject before the work begins.

    Raises:
        LlamaCppMissingError: llama.cpp cannot be imported.
    """
    if not is_installed():
        raise LlamaCppMissingError("xllamacpp is not installed")


def serve(path: str, context: int, adapter: str | None = None) -> None:
    """Load, tell the address, and wait for the end of standard input."""
    tell = _take_stdout()
    # A terminal sends Ctrl-C to this process too, where it stops an answer and not the conversation.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        import xllamacpp  # an extra, and a large library
    except ImportError as error:
        tell({"error": str(error), "missing": True})
        return
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = context
    params.n_parallel = 1
    params.use_jinja = True
    params.verbosity = _QUIET
    params.warmup = False
    params.ui = False
    params.port = 0
    # ggml's threads wait for each other in a loop: where one core is busy with something else, all of them stand still.
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = max(1, (os.cpu_count() or 1) // 2)
    if adapter:
        params.lora_adapters = [_build_adapter(xllamacpp, adapter)]
    try:
        server = xllamacpp.Server(params)
    except (RuntimeError, ValueError, OSError) as error:
        tell({"error": str(error)})
        return
    tell({"address": server.listening_address})
    sys.stdin.buffer.read()


def _build_adapter(xllamacpp: Any, path: str) -> Any:
    adapter = xllamacpp.CommonAdapterLoraInfo()
    adapter.path = path
    adapter.scale = 1.0
    return adapter


def _take_stdout() -> Callable[[Mapping[str, object]], None]:
    """What prints to standard output from now on prints to standard error, but for lines of JSON."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(what: Mapping[str, object]) -> None:
        out.write(json.dumps(what) + "\n")
        out.flush()

    return tell


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), *sys.argv[3:4])
