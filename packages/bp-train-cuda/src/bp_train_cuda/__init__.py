"""Fine-tune a language model with torch. Reading starts in `bp_data.loop.loop`, the loop, then in ``engines/``.

`CudaRail` is what Backpropagate calls. `train` is for programs that want the training alone, without run folders,
records and settings files: a base model folder, a data file and an output folder.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

from bp_runs.events import Emit
from bp_runs.rail import TrainOutcome
from bp_runs.spec import DataSpec, LoraSpec, ModelSpec, RunFolders, Settings, TrainingSpec, TrainSpec
from bp_train_cuda.rail import CudaRail

__all__ = ["CudaRail", "train"]


def train(
    base: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    training: TrainingSpec | None = None,
    lora: LoraSpec | None = None,
    max_seq_length: int = 2048,
    emit: Emit = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> TrainOutcome:
    """Fine-tune ``base`` on ``data`` and leave the result in ``output``: ``output/lora``, or ``output/model`` if full.

    Args:
        base: A Hugging Face model folder.
        data: A data file or folder, in any format that bp-data reads.
        output: Created if it does not exist.
        training: Method, length, rates and the like; default: supervised fine-tuning for as long as the data suggests.
        lora: Rank and layers of the adapter.
        max_seq_length: Longest example, in tokens.
        emit: Receives every event of the run.
        stop: Asked after every step; True ends the run with what was trained.

    Raises:
        CodedError: As `CudaRail.train`.
    """
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        model=ModelSpec(name=str(base), max_seq_length=max_seq_length),
        data=DataSpec(path=str(data)),
        training=training or TrainingSpec(),
        lora=lora or LoraSpec(),
    )
    folders = RunFolders(run_id=uuid.uuid4().hex[:12], output=folder, run=folder)
    return CudaRail().train(TrainSpec.build(settings, folders, Path(base)), emit, stop)
