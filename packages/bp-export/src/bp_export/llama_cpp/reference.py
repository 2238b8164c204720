"""transformers in the converter's environment: what a folder computes, for models that nothing here knows.

Independent of the exporter and of llama.cpp: PyTorch, float32, transformers' own class of the model.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from bp_export.chat.server import PipeReader
from bp_export.llama_cpp.environment import Converter
from bp_export.verify.decoder import NotCoveredError
from bp_export.verify.ops import Floats

MOST_WEIGHTS = 1.5e9
"""Weights of the largest model that is computed so: 6 GB in float32."""
_WAIT_SECONDS, _LAST_SECONDS = 30.0, 1.0


class TransformersModel:
    """A model folder that transformers computes, in a process that holds it until `close`.

    Args:
        converter: The environment.
        folder: Of the model.

    Raises:
        NotCoveredError: transformers cannot load it.
    """

    def __init__(self, converter: Converter, folder: Path) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="bp-export-")
        self._process = subprocess.Popen(  # noqa: S603  # our own script in its own interpreter
            converter.command("driver"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self._words = PipeReader(self._process.stderr) if self._process.stderr else None
        try:
            self._ask({"source": str(converter.source), "task": "compute", "model": str(folder)})
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def compute_logprobs(self, ids: Sequence[int], places: Sequence[int]) -> Floats:
        """As `bp_export.verify.forward.Forward.compute_logprobs`.

        Raises:
            NotCoveredError: transformers cannot run it.
        """
        output = Path(self._scratch.name) / "rows.npy"
        self._ask({"ids": list(ids), "places": list(places), "output": str(output)})
        rows: Floats = np.load(output)
        return rows

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(_WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._scratch.cleanup()

    def _ask(self, request: dict[str, Any]) -> None:
        """Send a line, and wait for the line that says it is done."""
        try:
            if self._process.stdin is None or self._process.stdout is None:
                raise OSError("the process has no pipes")
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = b""
        if not line:
            words = self._words.wait(_LAST_SECONDS) if self._words else ""
            raise NotCoveredError(f"transformers cannot run the model: {' '.join(words.splitlines()[-1:])[:300]}")
