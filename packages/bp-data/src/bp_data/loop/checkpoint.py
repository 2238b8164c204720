"""What every rail's checkpoints have in common, so that a run begun on one rail can be resumed on another.

    weights.safetensors     the trained weights by name, as they are after the step
    best.safetensors        those of the lowest validation loss so far, where there was a validation
    adapter_config.json     PEFT's description of them; absent for full fine-tuning
    optimizer.safetensors   AdamW's averages by name: ``NAME.exp_avg`` and ``NAME.exp_avg_sq``, float32; metadata: step
    state.json              the loop's: schema, step, tokens, seconds, losses, chunks, validation so far

Names of weights are PEFT's inside a model, `bp_data.loop.checkpoint_adapter` shows one. What else a rail needs, such as
the state of its random generators, is in files of its own, which another rail does without.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import orjson

from bp_runs.errors import CheckpointInvalidError, first_line
from bp_runs.migrations import schema_number

WEIGHTS_FILE = "weights.safetensors"
BEST_FILE = "best.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
STATE_NAME = "backpropagate.loop_state"
STATE_NUMBER = 1
STATE_SCHEMA = f"{STATE_NAME}/{STATE_NUMBER}"
FIRST, SECOND = ".exp_avg", ".exp_avg_sq"
"""Ends of names in `OPTIMIZER_FILE`."""
_SHARED = {"loop", "validation"}
"""Parts that every rail has; others, such as how a rail splits batches, are that rail's own."""
MARGIN = 16 * 2**20
"""Bytes for a checkpoint's small files: generators, losses, manifest."""


class Stateful(Protocol):
    """A part of the loop that remembers something from step to step."""

    def read_state(self) -> dict[str, Any]:
        """JSON-ready; read after a step is done."""
        ...

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """Take what `read_state` gave in another process."""
        ...


def write_state(folder: Path, parts: Mapping[str, Stateful]) -> None:
    """Write what each part remembers."""
    state = {name: part.read_state() for name, part in parts.items()}
    (folder / STATE_FILE).write_bytes(orjson.dumps({"schema": STATE_SCHEMA, **state}))


def read_state(folder: Path, parts: set[str] | None = None) -> dict[str, Any]:
    """What each part remembered.

    Args:
        folder: A checkpoint.
        parts: Names of the parts that a run has now; None: not compared.

    Raises:
        CheckpointInvalidError: The file is missing or damaged, or another version wrote it.
    """
    try:
        saved: dict[str, Any] = {"schema": f"{STATE_NAME}/0"} | orjson.loads((folder / STATE_FILE).read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise CheckpointInvalidError(f"{folder} cannot be read", cause=first_line(error)) from error
    remembered = saved.keys() - {"schema"}
    number = schema_number(saved, STATE_NAME) or math.inf
    if number != STATE_NUMBER or (parts is not None and remembered & _SHARED != parts & _SHARED):
        raise CheckpointInvalidError(
            f"{folder} was saved by another version of the rail",
            cause=f"{saved['schema']} of {sorted(remembered)}, not {STATE_SCHEMA} of {sorted(parts or remembered)}",
        )
    return saved
