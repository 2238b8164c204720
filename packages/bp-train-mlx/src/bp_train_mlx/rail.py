"""The MLX rail as far as it goes: it tells what the machine has; it does not train yet, and says so."""

from __future__ import annotations

import platform
import sys
from importlib.util import find_spec
from pathlib import Path

from bp_runs.events import Emit
from bp_runs.rail import EvalOutcome, Part, Probe, Stop, TrainOutcome
from bp_runs.spec import Settings, TrainSpec
from bp_train_mlx.errors import MlxUnavailableError

_NOT_YET = "training on MLX is not built yet; this version only recognises the machine"


class MlxRail:
    """Recognises Apple silicon; never usable in this version."""

    name = "mlx"

    def probe(self) -> Probe:
        """Unusable, with the first reason that holds."""
        device = "apple silicon" if sys.platform == "darwin" and platform.machine() == "arm64" else "cpu"
        installed = "mlx is installed" if find_spec("mlx") else "mlx is not installed"
        return Probe(usable=False, why=f"{_NOT_YET} ({installed})", device=device)

    def check(self, settings: Settings, folder: Path) -> None:
        """Refuse.

        Raises:
            MlxUnavailableError: Always, in this version.
        """
        del settings, folder
        raise MlxUnavailableError(_NOT_YET)

    def train(self, spec: TrainSpec, emit: Emit, stop: Stop) -> TrainOutcome:
        """Refuse.

        Raises:
            MlxUnavailableError: Always, in this version.
        """
        del spec, emit, stop
        raise MlxUnavailableError(_NOT_YET)

    def evaluate(self, spec: TrainSpec, adapter: Path | None, emit: Emit, *, part: Part = "all") -> EvalOutcome:
        """Refuse.

        Raises:
            MlxUnavailableError: Always, in this version.
        """
        del spec, adapter, emit, part
        raise MlxUnavailableError(_NOT_YET)
