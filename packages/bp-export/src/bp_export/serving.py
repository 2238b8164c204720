"""llama.cpp's server in a process of its own: what it does to a bad file, or to another ggml, stays there.

`python -m bp_export.serving FILE CONTEXT` loads a GGUF through xllamacpp, prints one JSON line (``address`` or
``error``) and serves on a loopback port until its standard input closes, which it does when the parent ends in any way.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from bp_export.errors import ChatFailedError, LlamaCppMissingError

_QUIET = -1
_LAST_WORDS = 500  # characters of stderr that an error carries
_WAIT_SECONDS = 10.0


class LlamaServer:
    """A GGUF served by llama.cpp at ``address``; close it.

    Raises:
        LlamaCppMissingError: xllamacpp is not installed.
        ChatFailedError: llama.cpp cannot load the file, or died of it.
    """

    def __init__(self, path: Path, context: int) -> None:
        if not _is_installed():
            raise LlamaCppMissingError("xllamacpp is not installed")
        self._process = subprocess.Popen(  # noqa: S603  # our own module in our own interpreter
            [sys.executable, "-m", "bp_export.serving", str(path), str(context)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.address: str = self._read_address(path)
        """``http://127.0.0.1:port``."""

    def close(self) -> None:
        """Unload the model."""
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()
        try:
            self._process.wait(_WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read_address(self, path: Path) -> str:
        line = b"" if self._process.stdout is None else self._process.stdout.readline()
        told = json.loads(line) if line.startswith(b"{") else {}
        if "address" in told:
            return str(told["address"])
        words = told.get("error") or self._read_last_words()
        self.close()
        if told.get("missing"):
            raise LlamaCppMissingError("xllamacpp is not installed", cause=words)
        raise ChatFailedError(f"llama.cpp cannot load {path}", cause=words)

    def _read_last_words(self) -> str:
        raw = b"" if self._process.stderr is None else self._process.stderr.read()
        return raw.decode(errors="replace").strip()[-_LAST_WORDS:] or "it died without a word"


def _is_installed() -> bool:
    try:
        return find_spec("xllamacpp") is not None
    except ImportError:
        return False


def serve(path: str, context: int) -> None:
    """Load, tell the address, and wait for the end of standard input."""
    try:
        import xllamacpp  # an extra, and a large library
    except ImportError as error:
        _tell({"error": str(error), "missing": True})
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
    try:
        server = xllamacpp.Server(params)
    except (RuntimeError, ValueError, OSError) as error:
        _tell({"error": str(error)})
        return
    _tell({"address": server.listening_address})
    sys.stdin.buffer.read()


def _tell(what: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
